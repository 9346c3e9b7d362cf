"""Audio files inside other files: members of tars, cells of Arrow and Parquet tables.

An utterance's audio is then an address, "slice:FILE:OFFSET:SIZE" (bytes of a file) or
"cell:FILE:ROW:COLUMN" (a cell that holds bytes, or {"bytes": ..., "path": ...}), and any of them
can be read at any time, in any order: what a step sees does not depend on what was read before.
"""

import functools
import threading
from pathlib import Path

from etils import epath

from otreg_jax.data.utterances import BadAudio

SLICE, CELL = "slice:", "cell:"
CACHED = 8  # row groups of Parquet files that are kept unpacked
_ALONE = threading.Lock()  # pyarrow's reader of a Parquet file crashes if threads share it


def is_address(audio: str) -> bool:
    """Whether an utterance's audio stands inside another file."""
    return audio.startswith((SLICE, CELL))


def slice_address(path: str, offset: int, size: int) -> str:
    return f"{SLICE}{path}:{offset}:{size}"


def cell_address(path: str, row: int, column: str) -> str:
    return f"{CELL}{path}:{row}:{column}"


def read(audio: str) -> bytes:
    """The bytes at an address. Raises BadAudio if there are none."""
    kind, _, rest = audio.partition(":")
    path, _, last = rest.rpartition(":")
    path, _, number = path.rpartition(":")
    if not path or not number.isdecimal():
        raise BadAudio("missing_file", f"{audio} is no {kind}:FILE:NUMBER:...")
    try:
        data = _slice(path, number, last) if kind == "slice" else _cell(path, int(number), last)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise BadAudio("unreadable", f"{audio} cannot be read: {error}") from None
    if not data:
        raise BadAudio("unreadable", f"{audio} holds no bytes")
    return data


def _slice(path: str, offset: str, size: str) -> bytes:
    with epath.Path(path).open("rb") as file:
        file.seek(int(offset))
        data = file.read(int(size))
    if len(data) < int(size):
        raise ValueError(f"the file ends {int(size) - len(data)} bytes too soon")
    return data


def _cell(path: str, row: int, column: str) -> bytes | None:
    table, row = _rows(path, row, column)
    value = table[column][row].as_py()
    return value.get("bytes") if isinstance(value, dict) else value


def _rows(path: str, row: int, column: str):
    """A table that holds the row, and where."""
    if Path(path).suffix == ".arrow":
        return arrow(path), row
    with _ALONE:
        metadata = _parquet(path).metadata
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if row < size:
                return _row_group(path, group, column), row
            row -= size
    raise IndexError("the file has not so many rows")


@functools.lru_cache(maxsize=256)
def arrow(path: str):
    """The table in a file of Arrow's streaming format, as `datasets` writes it; memory-mapped."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()


@functools.lru_cache(maxsize=256)
def _parquet(path: str):
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)


@functools.lru_cache(maxsize=CACHED)
def _row_group(path: str, group: int, column: str):
    return _parquet(path).read_row_group(group, columns=[column])
