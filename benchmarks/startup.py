"""How long a start takes, and how much memory, with so many utterances on disk.

    python -m benchmarks.data --part=startup                       # 10 million made-up ones
    python -m benchmarks.data --part=startup --utterances=200000

Slices of a few recordings, texts of 4 to 30 words. Processes of their own do what training does up
to its first batch, by its own functions: read, check and compare the data, tokenize, choose shapes,
plan the epoch, read audio. With up to a million utterances, the first start reads a manifest and
makes the index, the second one finds it, and their first batches must be the same. More of them
would take a quarter of an hour to read: there, the same writer makes the index of BLOCK utterances
that never stood in a manifest (a file of that name and size has no content). They are repeated,
tokens and digests are made up as well, and only the start from the index is measured.

Seconds are by the wall clock, `whole_seconds` with imports. Memory is the most that was resident,
pages of mapped files included; `own` leaves these out, at the end.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from ml_collections import ConfigDict

from otreg_jax import agreement, rundir, train
from otreg_jax import config as config_lib
from otreg_jax.data import (
    bucketing,
    embedded,
    index,
    manifest,
    pipeline,
    prompts,
    sets,
    sources,
    tokenization,
)

LANGUAGES = ("de", "en", "fr", "nl")
SECONDS = 20  # recordings of 1, 2, ... seconds
READ = 10**6  # utterances that a manifest holds at most
BLOCK = 10**5
LINE = 220  # bytes of a line, about


class MadeUp(Sequence):
    """Utterances, each made when it is asked for."""

    def __init__(self, folder: Path, count: int):
        rng = np.random.default_rng(0)
        syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]
        words = ["".join(rng.choice(syllables, size=1 + i % 4)) for i in range(5000)]
        self.folder, self.count = folder, count
        self.said = np.array(words)[rng.integers(len(words), size=99_991)].tolist()
        self.sizes = [16000 * 2 * (i + 1) + 44 for i in range(SECONDS)]  # of WAV files

    def __len__(self) -> int:
        return self.count

    def seconds(self, row):
        return 1 + row * 7919 % 104_729 % SECONDS

    def words(self, row):
        """How many there are: up to 1.3 a second and four."""
        return 4 + self.seconds(row) * (3 + row * 31 % 11) // 10

    def __getitem__(self, row: int) -> sources.Utterance:
        if row >= self.count:
            raise IndexError(row)
        seconds, start = self.seconds(row), row * 13 % 99_900
        path = f"{self.folder}/{seconds}.wav"
        return sources.Utterance(
            id=f"u{row}",
            audio=embedded.slice_address(path, 0, self.sizes[seconds - 1]),
            text=" ".join(self.said[start : start + self.words(row)]),
            duration=seconds,
            lang=LANGUAGES[row % 4],
            speaker=f"s{row % 997}",
            where=f"{self.folder}/train.jsonl:{row + 1}",
        )


def write(folder: Path, count: int) -> None:
    """The recordings, a tokenizer, and train.jsonl."""
    rng, utterances = np.random.default_rng(0), MadeUp(folder, count)
    for seconds in range(1, SECONDS + 1):
        sound = 0.1 * rng.standard_normal(16000 * seconds).clip(-3, 3)
        soundfile.write(folder / f"{seconds}.wav", sound, 16000)
    tokenization.train_sentencepiece(sorted(set(utterances.said)), folder / "tokenizer", 500)
    if count <= READ:
        manifest.write_manifest(folder / "train.jsonl", utterances)
    else:
        (folder / "train.jsonl").touch()
        os.truncate(folder / "train.jsonl", LINE * count)


def settings(folder: Path) -> ConfigDict:
    config = config_lib.default()
    config.data.train, config.data.cache = str(folder / "train.jsonl"), str(folder / "cache")
    config.tokenizer.path = str(folder / "tokenizer.model")
    config.data.num_buckets, config.batch_size = 8, 64
    config.ctc.weight, config.ctc.classes = 0.3, "used"
    return config


def make_index(folder: Path, count: int) -> None:
    """The index of utterances that no manifest holds, a multiple of BLOCK."""
    made_up, config = MadeUp(folder, BLOCK), settings(folder)
    sets._find_train = lambda *_: sources.Found(made_up, [])
    place = sets.load_train(config, folder).folder
    lines, end_N = (place / "lines").read_bytes(), np.load(place / "ends.npy")
    (place / "lines").write_bytes(b"")
    with open(place / "lines", "ab") as file:
        for _ in range(count // BLOCK):
            file.write(lines)
    starts = len(lines) * np.arange(count // BLOCK)
    np.save(place / "ends.npy", (starts[:, None] + end_N).ravel())
    utterances = index.Utterances(place)
    tokenizer = tokenization.load_tokenizer(config.tokenizer.path)
    made_of = bucketing._made_of(tokenizer, prompts.make(config, tokenizer, utterances))
    row_N = np.arange(count) % BLOCK
    end_N = np.cumsum(made_up.words(row_N))
    answer_N2 = np.stack([np.append(0, end_N[:-1]), end_N], axis=1)
    ids = np.random.default_rng(0).integers(3, 400, size=end_N[-1], dtype=np.int32)
    tokens = {"tokens": ids, "answer_N2": answer_N2, "heard_N2": None, "prompt_N2": None}
    blocks = [f"{i:016x}" for i in range(-(-count // agreement.BLOCK))]
    for name, of, value in (
        ("tokens", made_of, tokens),
        ("used", made_of, {"ids": list(range(3, 400))}),
        ("durations", None, {"seconds": made_up.seconds(row_N).astype(float)}),
        ("digests", agreement.BLOCK, {"digests": blocks}),
    ):
        index.remember(utterances, name, of, lambda value=value: value)


def start(folder: Path, workdir: Path) -> dict:
    """What training does up to its first batch; seconds of each part, memory in MiB."""
    laps, last = {}, time.time()

    def lap(name):
        nonlocal last
        laps[name], last = round(time.time() - last, 2), time.time()

    config = settings(folder)
    data = train.load_data(config, rundir.of(workdir))
    lap("read, check, compare, tokenize")
    batches = pipeline.train_batches(
        data.train,
        data.tokenizer,
        config.data,
        batch_size=config.batch_size,
        seed=0,
        num_steps=10**9,
        prompter=data.prompter,
        corpus=data.corpus,
    )
    batch = next(batches)
    lap("shapes, plan, first batch")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "seconds": laps,
        "cpu_seconds": round(time.process_time(), 1),
        # Not getrusage's figure, in which what the parent held takes part.
        "peak_mib": int(status["VmHWM"].split()[0]) // 1024,
        "own_mib": int(status["RssAnon"].split()[0]) // 1024,
        "first_batch": batch["index"].tolist(),
    }


def measure(folder: Path, count: int) -> dict:
    """A start from the index, and with up to READ utterances one that makes it before."""
    write(folder, count)
    results, batches = {"utterances": count}, []
    if count > READ:
        make_index(folder, count)
    for name in ("first", "from_the_index")[count > READ :]:
        began = time.time()
        command = [sys.executable, "-m", "benchmarks.startup", str(folder), str(folder / name)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        whole = round(time.time() - began, 1)
        results[name] = {"whole_seconds": whole, **json.loads(said.splitlines()[-1])}
        batches.append(results[name].pop("first_batch"))
        results[name]["load_average"] = os.getloadavg()[0]
    assert batches[0] == batches[-1] and len(set(batches[0])) == 64
    files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    return results | {"index_mib": sum(path.stat().st_size for path in files) // 2**20}


if __name__ == "__main__":
    print(json.dumps(start(Path(sys.argv[1]), Path(sys.argv[2]))), flush=True)
    os._exit(0)  # batches that are read ahead are not waited for
