"""A run directory: the name of every file in it, how files are written and how they are read.

It may be local or remote (gs://...). A whole file appears at once, by a rename, or, remote, by the
write of its object: who reads it finds the old content or the new, whatever kills the writer.
"""

import io
import json
import logging
import math
import os
import socket
from typing import Any, NamedTuple

import fsspec
from etils import epath

# gcsfs remembers what was in a folder. Other processes write there: one that still sees what a
# killed save left would wait for ever for the folder that process 0 has made since.
fsspec.config.conf["gs"] = {"use_listings_cache": False}


class Files(NamedTuple):
    """The paths of a run directory. What is in each file: docs/evaluation.md and README.md."""

    root: epath.Path
    config: epath.Path  # the resolved configuration
    description: epath.Path  # of the training data: what later use of a model needs to know
    tokenizer: epath.Path  # the tokenizer's path up to its suffix
    llm: epath.Path  # the LLM in Hugging Face layout, if it was pretrained on text here
    data: epath.Path  # synthetic speech
    encoded: epath.Path  # a frozen encoder's outputs (`encoder.keep`)
    checkpoints: epath.Path  # a directory a step
    compiled: epath.Path  # programs, if this is remote: compiled once for all hosts and restarts
    metrics: epath.Path
    profile: epath.Path  # traces of the profiler
    eval: epath.Path  # what evaluation writes:
    results: epath.Path
    hypotheses: epath.Path
    figures: epath.Path
    partial: epath.Path  # what an evaluation under way has decoded
    report: epath.Path
    eval_skipped: epath.Path  # what cannot be evaluated, and why

    def skipped(self, process: int) -> epath.Path:
        """What training leaves out and why, as this process met it."""
        return self.root / (f"skipped-{process}.jsonl" if process else "skipped.jsonl")

    def events(self, seconds: float) -> epath.Path:
        """TensorBoard's events of a start at this Unix time, by TensorBoard's rule of names."""
        return self.root / f"events.out.tfevents.{int(seconds):010d}.{socket.gethostname()}"


def of(workdir: str | os.PathLike) -> Files:
    """The files of a run directory; nothing is read or made."""
    root = epath.Path(workdir)
    absolute = root if is_remote(root) else root.absolute()  # as orbax wants it
    evaluation = root / "eval"
    return Files(
        root=root,
        config=root / "config.json",
        description=root / "data.json",
        tokenizer=root / "tokenizer",
        llm=root / "llm",
        data=root / "data",
        encoded=root / "encoded",
        checkpoints=absolute / "checkpoints",
        compiled=root / "compiled",
        metrics=root / "metrics.jsonl",
        profile=root / "profile",
        eval=evaluation,
        results=evaluation / "results.json",
        hypotheses=evaluation / "hypotheses.jsonl",
        figures=evaluation / "figures.npz",
        partial=evaluation / "partial.jsonl",
        report=evaluation / "report.html",
        eval_skipped=evaluation / "skipped.jsonl",
    )


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on a storage service (gs://...): written whole, never appended to."""
    return "://" in str(path)


def checkpoint_steps(files: Files) -> list[int]:
    """The steps of which there is a checkpoint, readable or not, rising."""
    if not files.checkpoints.exists():
        return []
    return sorted(int(path.name) for path in files.checkpoints.iterdir() if path.name.isdigit())


# Writing ---------------------------------------------------------------------------------------


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON of dicts, lists, strings and numbers; null for NaN and infinities, which JSON lacks."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def holds_something(directory: str | os.PathLike) -> bool:
    """Whether there is a file or folder in a directory, which need not exist."""
    path = epath.Path(directory)
    return path.exists() and any(path.iterdir())


def copy_tree(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies all files below a directory; either may be remote."""
    source, target = epath.Path(source), epath.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            path.copy(target / path.name)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file, by a rename; makes its directory. Raises OSError, the old file kept."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")  # two writers do not meet in one file
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name without its content
        os.replace(part, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes one JSON value."""
    write_text(path, dumps(value, indent=2) + "\n")


def write_lines(path: str | os.PathLike, values: list) -> None:
    """Writes JSON lines."""
    write_text(path, "".join(dumps(value) + "\n" for value in values))


def append_lines(path: str | os.PathLike, values: list) -> None:
    """Adds JSON lines to a file, at once: processes may add to a local one side by side."""
    data = "".join(dumps(value) + "\n" for value in values).encode()
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        write_bytes(path, (read_bytes(path) if path.exists() else b"") + data)
    else:
        _append(path, data)


class Appended:
    """A file that grows beside a run and never stops it.

    Local data is in the file when `add` returns. A remote object is written whole by `publish`. If
    the disk is full or the bucket does not answer, a warning says so, once; the data is kept and
    written at the next occasion. What stands in the file is always a beginning of what was added.

    Args:
      start: the first content, in place of what the file holds.
    """

    def __init__(self, path: str | os.PathLike, start: bytes = b""):
        self.path, self.unwritten = epath.Path(path), start
        self.is_new, self.is_failing = True, False
        if not is_remote(path):
            self.publish()

    def add(self, data: bytes) -> None:
        self.unwritten += data
        if not is_remote(self.path):
            self.publish()

    def publish(self) -> None:
        """Writes what is not written yet."""
        try:
            if self.is_new or is_remote(self.path):
                write_bytes(self.path, self.unwritten)
            else:
                _append(self.path, self.unwritten)
        except Exception as error:  # storage services raise errors of many libraries
            if not self.is_failing:
                logging.warning(
                    "%s cannot be written (%s): the run goes on, and so do tries to write it",
                    self.path,
                    error,
                )
            self.is_failing = True
            return
        self.is_new = self.is_failing = False
        if not is_remote(self.path):
            self.unwritten = b""


def _append(path: epath.Path, data: bytes) -> None:
    """Appends all of `data` to a local file, or nothing."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, io.SEEK_END)
        left = memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


# Reading ---------------------------------------------------------------------------------------


def read_bytes(path: str | os.PathLike) -> bytes:
    """What a file holds: of a remote one, whatever else happens to it, one of its contents whole.

    An opened object is read up to the length that it had when it was opened, be it another by then.
    """
    if not is_remote(path):
        return epath.Path(path).read_bytes()
    storage, name = fsspec.core.url_to_fs(str(path))
    return storage.cat_file(name)


def read_json(path: str | os.PathLike, remedy: str) -> dict:
    """The JSON object that a file holds.

    Raises:
      ValueError: it holds anything else; one line that names the place and ends with `remedy`.
      OSError: it cannot be read.
    """
    return _parse(_read_text(path, remedy), str(path), 1, remedy)


def read_lines(path: str | os.PathLike, remedy: str) -> list[dict]:
    """The JSON objects that a file holds, one a line; [] if there is no file. The beginning of a
    line at the end, which a killed writer leaves, is left out. Errors: as `read_json`.
    """
    if not epath.Path(path).exists():
        return []
    lines = _read_text(path, remedy).split("\n")
    if not lines[-1].endswith("}"):
        lines.pop()
    return [_parse(line, str(path), number, remedy) for number, line in enumerate(lines, 1)]


def _read_text(path, remedy: str) -> str:
    try:
        return read_bytes(path).decode()
    except IsADirectoryError as error:
        raise _damaged(path, "a folder, not a file", remedy) from error
    except UnicodeDecodeError as error:
        raise _damaged(path, f"byte {error.start} is no UTF-8 text", remedy) from error


def _parse(text: str, path: str, first_line: int, remedy: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        reason = f"not JSON ({getattr(error, 'msg', error)})" if text.strip() else "empty"
        raise _damaged(f"{path}:{line}", reason, remedy) from error
    except RecursionError as error:
        raise _damaged(f"{path}:{first_line}", "nested too deeply", remedy) from error
    if not isinstance(value, dict):
        raise _damaged(f"{path}:{first_line}", "not a JSON object", remedy)
    return value


def _damaged(place, reason: str, remedy: str) -> ValueError:
    return ValueError(f"{place}: damaged, {reason}; {remedy}")
