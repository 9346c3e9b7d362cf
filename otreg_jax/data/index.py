"""Large data sets, read and checked once; later starts find what the first one found.

It is kept in a folder: the utterances as JSON lines, where each ends, and what was to be told of
the others. To open it takes no time, and memory only for the utterances that somebody looks at.
What is worked out of all of them, as their tokens, is kept beside it and mapped into memory
(`remember`). An index is of the files that were read, by their sizes and times, of the settings
that matter and of this code; if any is another, it is made anew.
"""

import concurrent.futures
import hashlib
import itertools
import json
import os
import posixpath
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from etils import epath

from otreg_jax import rundir
from otreg_jax.data import embedded, readers, records, remote
from otreg_jax.data.utterances import THREADS, Found, Problem, Utterance

SMALL = 2**24  # bytes: less is read anew each time, in a second or two
_BLOCK = 2**16  # utterances that are written at once


class Utterances(Sequence):
    """The utterances of an index, each read when it is asked for; a slice is a list of them."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._end_N = np.load(self.folder / "ends.npy", mmap_mode="r")
        # Not mapped: the system maps far more around a line than is asked for.
        self._lines = open(self.folder / "lines", "rb", buffering=0)  # noqa: SIM115
        if self._end_N[-1] != os.path.getsize(self._lines.name):
            raise ValueError(f"{self.folder}: the index is not whole")

    def __len__(self) -> int:
        return len(self._end_N)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[row] for row in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        start, end = int(self._end_N[i - 1]) if i else 0, int(self._end_N[i])
        line = os.pread(self._lines.fileno(), end - start, start)
        return Utterance(*map(_tuples, json.loads(line)))

    def __reduce__(self):  # a worker process maps it as well
        return Utterances, (self.folder,)


class _Mapped(np.memmap):
    """A mapped .npy file, of which a worker process gets the name, not the content."""

    def __reduce__(self):
        if self._mmap is None or self.nbytes + self.offset != os.path.getsize(self.filename):
            return np.array(self).__reduce__()
        return _mapped, (self.filename,)


def _mapped(path: str | os.PathLike) -> np.ndarray:
    array = np.load(path, mmap_mode="r")
    return array.view(_Mapped) if array.size else array


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def once(home: Path, paths: Sequence[str], settings: Any, find: Callable[[], Found]) -> Found:
    """find(), or what an index in `home` says that it gave.

    Small data sets are not indexed. Of several processes that make the same index at a time, one's
    counts. Where it cannot be written, a line says so, and the run does without.

    Args:
      paths: data sets, as `sources.scan` takes them.
      settings: whatever else decides what is found; has a JSON form.
    """
    read = _stamps(_files(paths))
    if sum(stamp[0] for stamp in read.values() if stamp) < SMALL:
        return find()
    entry = home / f"{_digest([list(paths), settings, _code()])}.json"
    if known := _known(entry, read):
        return known
    found = find()
    if not found.utterances:
        return found
    try:
        _write(entry, found, read)
    except OSError as error:
        reason = error.strerror or error
        print(f"{home}: no index can be kept there ({reason}): every start will read all data")
    return _known(entry, read) or found


def _known(entry: Path, read: dict) -> Found | None:
    """What an index holds; None if there is none, or one of other files."""
    try:
        about = json.loads(entry.read_text(encoding="utf-8"))
        stamps = about["stamps"]
        if not (read.items() <= stamps.items() and _stamps(stamps) == stamps):
            return None
        told = [(note, [Problem(*p) for p in problems]) for note, problems in about["told"]]
        return Found(Utterances(entry.parent / about["folder"]), told, about["segments"])
    except (OSError, ValueError):
        return None


def _write(entry: Path, found: Found, read: dict) -> None:
    """Writes an index, if the files are still those that were read, and takes away the one that it
    comes in place of."""
    folder = entry.with_name(f"{entry.stem}-{os.urandom(4).hex()}")
    folder.mkdir(parents=True)
    try:
        places = write_utterances(folder, found.utterances)
        stamps = _stamps(read.keys() | places)
        if not read.items() <= stamps.items() or _known(entry, read):
            return  # the data changed meanwhile, or another process was faster
        old = json.loads(entry.read_text(encoding="utf-8"))["folder"] if entry.exists() else ""
        about = {"folder": folder.name, "stamps": stamps}
        rundir.write_json(entry, about | {"told": found.told, "segments": found.segments})
        if old:
            shutil.rmtree(entry.with_name(old), ignore_errors=True)
        folder = None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def write_utterances(folder: Path, utterances: Iterable[Utterance]) -> set[str]:
    """Writes what `Utterances` maps. Returns the folders and files that hold the audio."""
    ends, end, places = [], 0, set()
    rows = iter(tqdm.tqdm(utterances, desc="indexing", unit="utt", delay=2))
    with open(folder / "lines", "wb") as file:
        while block := list(itertools.islice(rows, _BLOCK)):
            places |= {_place(u.audio) for u in block}
            lines = [(json.dumps(u, ensure_ascii=False) + "\n").encode() for u in block]
            file.write(b"".join(lines))
            ends.append(end + np.cumsum([len(line) for line in lines]))
            end = int(ends[-1][-1])
    np.save(folder / "ends.npy", np.concatenate(ends))
    return places - {""}


def _place(audio: str) -> str:
    """Whose time tells that an audio file came or went; "" of what stands in `paths` itself."""
    if audio.startswith(records.PREFIX):
        return ""
    if embedded.is_address(audio):
        return audio.split(":", 1)[1].rsplit(":", 2)[0]
    return "" if "://" in audio else posixpath.dirname(audio) or "."


def _files(paths: Sequence[str]) -> list[str]:
    """The files that data sets consist of."""
    found = []
    for path in map(remote.localize, paths):
        remote.check([path], f"{path} lies there")
        if not epath.Path(path).exists():  # FOLDER:SPLIT, or tars by their numbers
            path = path.rpartition(":")[0] or path
        is_folder = epath.Path(path).is_dir()
        found += _below(epath.Path(path)) if is_folder else map(str, readers.braces(path) or [path])
    return found


def _below(folder: epath.Path) -> list[str]:
    if "://" in os.fspath(folder):
        return [os.fspath(path) for path in folder.iterdir()]
    return [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]


def _stamps(paths: Iterable[str]) -> dict[str, list | None]:
    """{path: [size, time]} of files and folders; None for what is not there."""
    paths = sorted(paths)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(paths, pool.map(_stamp, paths), strict=True))


def _stamp(path: str) -> list | None:
    try:
        if "://" in path:
            stat = epath.Path(path).stat()
            return [stat.length, stat.mtime]
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    except OSError:
        return None


def _code() -> int:
    """A checksum of this package: another version of it may find otherwise."""
    checksum = 0
    for path in sorted(Path(rundir.__file__).parent.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return checksum


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


# What is worked out of all utterances -----------------------------------------------------------


def remember(utterances: Sequence[Utterance], name: str, made_of: Any, make: Callable) -> dict:
    """make(), of indexed utterances only the first time.

    Args:
      name: of what is made. made_of: what it depends on beside the utterances; has a JSON form.
      make: returns {name: array or JSON value}; from an index, arrays are mapped.
    """
    if not isinstance(utterances, Utterances):
        return make()
    folder = utterances.folder / f"{name}-{_digest(made_of)}"
    if (folder / "values.json").exists():
        return _remembered(folder)
    made, part = make(), folder.with_name(f"{folder.name}.{os.urandom(4).hex()}")
    arrays = {key: x for key, x in made.items() if isinstance(x, np.ndarray)}
    try:
        part.mkdir()
        for key, array in arrays.items():
            np.save(part / f"{key}.npy", array)
        rundir.write_json(part / "values.json", {k: x for k, x in made.items() if k not in arrays})
        part.rename(folder)
    except OSError:  # another process was faster, the disk is full, or the index is gone
        shutil.rmtree(part, ignore_errors=True)
    return _remembered(folder) if (folder / "values.json").exists() else made


def _remembered(folder: Path) -> dict:
    values = json.loads((folder / "values.json").read_text(encoding="utf-8"))
    return values | {path.stem: _mapped(path) for path in folder.glob("*.npy")}


def durations(utterances: Sequence[Utterance]) -> np.ndarray:
    """Seconds of each, float64 [N]."""
    of_all = lambda: {"seconds": np.fromiter((u.duration for u in utterances), float)}
    return remember(utterances, "durations", None, of_all)["seconds"]


def column(
    utterances: Sequence[Utterance], name: str, of: Callable[[Utterance], str]
) -> tuple[np.ndarray, list[str]]:
    """What `of` says of each utterance, as (its number among what is said, int32 [N]; all that is
    said, in order). name: of what is asked."""

    def ask():
        numbers = {}
        number_N = np.fromiter((numbers.setdefault(of(u), len(numbers)) for u in utterances), int)
        said = sorted(numbers)
        order = np.zeros(len(said), np.int32)
        order[[numbers[x] for x in said]] = np.arange(len(said))
        return {"number": order[number_N], "said": said}

    found = remember(utterances, name, None, ask)
    return found["number"], found["said"]
