"""What the processes of a run must have alike, compared before they train; and what its data are.

A folder that is not mounted on one host, an older copy of the code, another revision of a model:
the processes would train on, each on its own, and nothing would tell.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from etils import epath

from otreg_jax import cluster
from otreg_jax import config as config_lib
from otreg_jax.data import index, sources

BLOCK = 512  # utterances whose digest is compared first
SAMPLES, SAMPLE_BYTES = 16, 4096  # of a file of weights


def check_start(config) -> None:
    """Raises ValueError, in every process, if they were given another configuration or other code;
    it names the host and the first difference."""
    cluster.agree("settings", {key: repr(x) for key, x in config_lib.flatten(config).items()})
    cluster.agree("code", code())


def check_data(what: str, utterances: Sequence[sources.Utterance]) -> str:
    """Raises ValueError, in every process, if they have read other utterances, or in another order;
    it names the host and the first utterance that differs. Returns their `corpus`."""
    mine = digests(utterances)
    everyones = cluster.gather(mine)
    length = max(map(len, everyones))
    padded = [theirs + [None] * (length - len(theirs)) for theirs in everyones]
    different = [i for i, column in enumerate(zip(*padded, strict=True)) if len(set(column)) > 1]
    if different:
        start = different[0] * BLOCK
        block = enumerate(utterances[start : start + BLOCK], start)
        cluster.agree(what, {f"utterance {i}": _line(u) for i, u in block})
    return _described(utterances, mine)


def check_weights(paths: Sequence[str]) -> None:
    """Raises ValueError, in every process, if model directories differ in their files' names, sizes
    or samples of their content."""
    if jax.process_count() == 1:
        return  # a bucket would be read for nothing
    cluster.agree("weights", {name: s for path in paths if path for name, s in signature(path)})


def code() -> dict[str, str]:
    """{file of this package: checksum, library: version}."""
    folder = Path(__file__).parent
    files = {
        f"otreg_jax/{path.relative_to(folder)}": f"{zlib.crc32(path.read_bytes()):08x}"
        for path in sorted(folder.rglob("*.py"))
    }
    return files | {name: metadata.version(name) for name in ("jax", "jaxlib", "orbax-checkpoint")}


def corpus(utterances: Sequence[sources.Utterance]) -> str:
    """Utterances and their order in one line: "960 utterances, 1.25 h, 0123456789abcdef"."""
    return _described(utterances, digests(utterances))


def _described(utterances: Sequence[sources.Utterance], found: Sequence[str]) -> str:
    digest = hashlib.sha256("".join(found).encode()).hexdigest()[:16]
    hours = float(index.durations(utterances).sum()) / 3600
    return f"{len(utterances)} utterances, {hours:.2f} h, {digest}"


def digests(utterances: Sequence[sources.Utterance]) -> list[str]:
    """Of the ids, durations, texts and languages of each BLOCK of utterances."""
    digest = lambda block: hashlib.sha256("\n".join(map(_line, block)).encode()).hexdigest()[:16]
    starts = range(0, len(utterances), BLOCK)
    of_all = lambda: {"digests": [digest(utterances[i : i + BLOCK]) for i in starts]}
    return index.remember(utterances, "digests", BLOCK, of_all)["digests"]


def signature(path: str) -> list[tuple[str, str]]:
    """(file, "size checksum of samples of it") of every file of a model directory, local or not."""
    found = []
    for file in sorted(epath.Path(path).iterdir(), key=lambda file: file.name):
        if not file.is_dir():
            size, checksum = file.stat().length, 0
            with file.open("rb") as stream:
                for start in np.linspace(0, max(size - SAMPLE_BYTES, 0), SAMPLES).astype(int):
                    stream.seek(int(start))
                    checksum = zlib.crc32(stream.read(SAMPLE_BYTES), checksum)
            found.append((str(file), f"{size} {checksum:08x}"))
    return found


def _line(u: sources.Utterance) -> str:
    asked = [u.task, u.fields] if u.fields else []
    return json.dumps([u.id, u.duration, u.offset, u.lang, u.text, *asked], ensure_ascii=False)
