"""Data sets of other tools, read where they lie, as lines of a manifest.

    Kaldi, ESPnet   a directory with wav.scp and text; segments, utt2spk, utt2lang, utt2dur
    Hugging Face    a directory that `datasets` saved (DIR, of several splits DIR:train), a Parquet
                    file, or a directory of them (DIR:train: those whose names begin so)
    WebDataset      a tar, a directory of tars, or "train-{000..015}.tar"
    Lhotse Shar     a directory with cuts.*.jsonl.gz and recording.*.tar

Each reader gives (where, line) in the order of the source; `where` is the set and the row, from 1.
Audio stays where it is, see `embedded`. Nothing in a data set is run: pipes in wav.scp are refused.
"""

import contextlib
import gzip
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from otreg_jax.data import corpora, embedded
from otreg_jax.data.records import LANG, SPEAKER, TEXT

Lines = Iterator[tuple[str, dict]]
AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus")
_BRACES = re.compile(r"{(\d+)\.\.(\d+)}")


def find(path: str) -> Callable[[], Lines] | None:
    """What reads the data set at `path`, a local one; None if it is none of these."""
    folder, _, split = path.rpartition(":")
    place = Path(path)
    for where, part in ((place, ""), (Path(folder), split)) if folder else ((place, ""),):
        if saved := _saved(where, part):
            return lambda: _arrow_lines(path, saved)
        if parquet := _files(where, f"{part}*.parquet", "**/"):
            return lambda: _parquet_lines(path, parquet)
    if (place / "wav.scp").is_file():
        return lambda: _kaldi_lines(place)
    if cuts := _files(place, "cuts.*.jsonl.gz"):
        return lambda: _shar_lines(path, cuts)
    if tars := _files(place, "*.tar") or braces(path):
        return lambda: _tar_lines(path, tars)
    return None


def _files(place: Path, pattern: str, below: str = "") -> list[Path]:
    """The file itself, or those of a directory, that fit the pattern, in the order of names."""
    if place.is_file():
        return [place] if place.match(pattern) else []
    return sorted(place.glob(below + pattern)) if place.is_dir() else []


def braces(path: str) -> list[Path]:
    """ "train-{000..003}.tar" as its files; those that are missing too, to be named."""
    found = _BRACES.search(path)
    if not found or not path.endswith(".tar"):
        return []
    first, last = found.groups()
    names = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [Path(path[: found.start()] + name + path[found.end() :]) for name in names]


@contextlib.contextmanager
def _reading(file: Path | str, kind: str):
    """Errors in the block name the file."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError) as error:
        raise ValueError(f"{file}: not {kind}, or damaged: {error}") from None


# Kaldi -----------------------------------------------------------------------------------------


def _kaldi_lines(folder: Path) -> Lines:
    tables = {
        name: _table(folder / name)
        for name in ("wav.scp", "text", "segments", "utt2spk", "utt2lang", "utt2dur")
    }
    recordings = {key: value for key, value, _ in tables["wav.scp"]}
    columns = {"text": "text", "utt2spk": "speaker", "utt2lang": "lang", "utt2dur": "duration"}
    told = {
        column: {key: value for key, value, _ in tables[name]} for name, column in columns.items()
    }
    listed = "segments" if tables["segments"] else "wav.scp"
    for key, value, number in tables[listed]:
        line = {"id": key} | {name: row[key] for name, row in told.items() if key in row}
        try:
            if "duration" in line:
                line["duration"] = _number(line["duration"], "utt2dur")
            if listed == "segments":
                recording, start, end = value.split()
                offset = _number(start, listed)
                line |= {"offset": offset, "duration": _number(end, listed) - offset}
                value = recordings[recording]
            line["audio_filepath"] = _scp_path(value, folder)
        except KeyError:
            line = {"damaged": f"recording {recording!r} stands not in wav.scp"}
        except ValueError as error:
            line = {"damaged": str(error)}
        yield f"{folder / listed}:{number}", line
    known, seen = {key for key, *_ in tables[listed]}, set()
    for key, _, number in tables["text"]:
        if key not in known or key in seen:
            why = "twice in text" if key in known else f"not in {listed}"
            yield f"{folder / 'text'}:{number}", {"damaged": f"{key!r} stands {why}"}
        seen.add(key)


def _number(text: str, table: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{table} has {text!r}, not a number of seconds") from None


def _table(path: Path) -> list[tuple[str, str, int]]:
    """(key, value, line number) of a Kaldi table; empty if there is no such file."""
    if not path.is_file():
        return []
    lines = corpora.read_text(path).split("\n")
    cut = (line.strip().partition(" ") for line in (text.replace("\t", " ") for text in lines))
    return [(key, value.strip(), n) for n, (key, _, value) in enumerate(cut, start=1) if key]


def _scp_path(value: str, folder: Path) -> str:
    """The audio file of a wav.scp entry; a relative path starts at the folder or, as in Kaldi,
    where the command runs."""
    if value.endswith("|"):
        raise ValueError(f"a pipe is not run: {value[:60]!r}; write the audio to a file first")
    if re.search(r"\.ark:\d+$", value):
        raise ValueError(f"{value!r} lies in an archive; write the audio to files first")
    inside = folder / value
    found = inside if inside.exists() or not os.path.exists(value) else Path(value)
    return str(found.absolute())


# Hugging Face ----------------------------------------------------------------------------------


def _saved(folder: Path, split: str) -> Path | None:
    """Where `datasets` saved a split: "train", if none is named and there are several."""
    if (folder / "dataset_dict.json").is_file():
        folder, several = folder / (split or "train"), folder
        if not folder.is_dir():
            there = ", ".join(sorted(path.parent.name for path in several.glob("*/state.json")))
            raise FileNotFoundError(f"{several}: no split {folder.name!r}, there are {there}")
    elif split:
        return None
    return folder if (folder / "state.json").is_file() else None


def _arrow_lines(path: str, folder: Path) -> Lines:
    told = folder / "state.json"
    with _reading(told, "what `datasets` writes"):
        state = json.loads(told.read_text(encoding="utf-8"))
        files = [str(folder / entry["filename"]) for entry in state["_data_files"]]
        indices = [folder / entry["filename"] for entry in state.get("_indices_files") or ()]
    tables = {file: _arrow(file) for file in files}
    rows = [(file, row) for file in files for row in range(tables[file].num_rows)]
    for file in indices:  # what select, filter or shuffle left
        rows = [rows[i] for i in _arrow(str(file))["indices"].to_pylist()]
    columns = {file: _columns(table) for file, table in tables.items()}
    layouts = {file: _layout(table.schema, file) for file, table in tables.items()}
    for number, (file, row) in enumerate(rows, start=1):
        cells = {name: column[row].as_py() for name, column in columns[file].items()}
        where = f"{path}:{number}"
        yield where, _cell_line(layouts[file], cells, file, row, where)


def _arrow(file: str):
    with _reading(file, "a table of Arrow's streaming format"):
        return embedded.arrow(file)


def _columns(table) -> dict:
    """The columns of a table that hold texts, numbers or lists of texts, and paths of audio."""
    import pyarrow.compute

    found = {f.name: table[f.name] for f in table.schema if _is_plain(f.type)}
    for field in table.schema:
        if _is_audio(field) and "path" in field.type.names:
            found[field.name] = pyarrow.compute.struct_field(table[field.name], "path")
    return found


def _parquet_lines(path: str, files: list[Path]) -> Lines:
    import pyarrow.parquet

    number = 0
    for file in files:
        with _reading(file, "a Parquet file"):
            table, row = pyarrow.parquet.ParquetFile(file), 0
        schema = table.schema_arrow
        layout = _layout(schema, str(file))
        names = [f.name for f in schema if _is_plain(f.type)]
        names += [f"{f.name}.path" for f in schema if _is_audio(f) and "path" in f.type.names]
        with _reading(file, "a Parquet file"):
            for batch in table.iter_batches(columns=names):
                for cells in batch.to_pylist():
                    number += 1
                    where = f"{path}:{number}"
                    yield where, _cell_line(layout, cells, str(file), row, where)
                    row += 1


def _is_plain(kind) -> bool:
    """Whether a type is one of texts, numbers or lists of texts."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = lambda one: types.is_string(one) or types.is_large_string(one)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind)
    return is_text(kind) or is_number or (is_list and is_text(kind.value_type))


def _is_audio(field) -> bool:
    import pyarrow.types as types

    return types.is_struct(field.type) and "bytes" in field.type.names


class _Layout(NamedTuple):
    """What the columns of a table hold: which one audio, and whether as paths; the names of the
    classes whose numbers a column has; of columns that no prompt can name, their type."""

    audio: str
    has_paths: bool
    classes: dict[str, list[str]]
    others: dict[str, dict]


def _layout(schema, where: str) -> _Layout:
    found = [field.name for field in schema if _is_audio(field)]
    found += [name for name in ("audio", "audio_filepath", "file") if name in schema.names]
    if not found:
        raise ValueError(f"{where}: no column holds audio; there are {', '.join(schema.names)}")
    audio = schema.field(found[0])
    unknown = [f for f in schema if not _is_plain(f.type) and f != audio]
    others = {f.name: {"type": str(f.type)} for f in unknown}
    return _Layout(audio.name, not _is_audio(audio), _class_names(schema), others)


def _cell_line(layout: _Layout, cells: dict, file: str, row: int, where: str) -> dict:
    given = cells.pop(layout.audio, None)
    given = given.get("path") if isinstance(given, dict) else given
    local = given and str((Path(file).parent / given).absolute())
    is_file = local and (layout.has_paths or os.path.isfile(local))
    told = cells | layout.others
    for name in layout.classes.keys() & cells.keys():
        number = cells[name]
        told[name] = layout.classes[name][number] if number is not None and number >= 0 else None
    line = _renamed({name: x for name, x in told.items() if x is not None and name != "id"})
    line["audio_filepath"] = local if is_file else embedded.cell_address(file, row, layout.audio)
    return line | {"id": where}  # ids of these sets name sentences, not recordings


def _class_names(schema) -> dict[str, list[str]]:
    """The names of the classes of columns that hold their numbers, as `datasets` writes them."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told["info"]["features"].items()
        return {name: f["names"] for name, f in features if f.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # another library's table


def _renamed(row: dict) -> dict:
    """A row with text, language and speaker under their names here. Where it gives one of them
    under several names, the preferred one counts, and the others stay as they are."""
    line = dict(row)
    for known, names in (("text", TEXT), ("lang", LANG), ("speaker", SPEAKER)):
        there = [name for name in names if name in line]
        found = next((name for name in there if line[name]), there[0] if there else known)
        if found != known:
            line[known] = line.pop(found)
    return line


# Tars ------------------------------------------------------------------------------------------


def _tar_lines(path: str, tars: list[Path]) -> Lines:
    """The samples of WebDataset tars: members in a row whose names agree up to the first dot."""
    number = 0
    for tar in tars:
        key, line = None, {}
        for name, offset, size, data in _members(tar):
            folder, _, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            if (folder, stem) != key:
                if key is not None:
                    number += 1
                    yield f"{path}:{number}", line
                key, line = (folder, stem), {"id": f"{folder}/{stem}".lstrip("/")}
            _add_member(line, f".{ending.lower()}", tar, offset, size, data)
        if key is not None:
            number += 1
            yield f"{path}:{number}", line


def _add_member(line: dict, ending: str, tar: Path, offset: int, size: int, data) -> None:
    if ending in AUDIO:
        line["audio_filepath"] = embedded.slice_address(str(tar), offset, size)
        return
    try:
        if ending == ".json":
            told = json.loads(data())
            if not isinstance(told, dict):
                raise ValueError("not a JSON object")
            line |= _renamed({name: x for name, x in told.items() if name != "id"})
        elif ending in (".txt", ".text", ".transcript"):
            line["text"] = data().decode("utf-8").strip()
        else:
            line.setdefault(ending, True)  # named as not used
    except ValueError as error:
        line["damaged"] = f"{tar}: {line['id']}{ending}: {error}"


def _members(tar: Path) -> Iterator[tuple[str, int, int, Callable[[], bytes]]]:
    """(name, offset, size, what reads it) of the files of a tar, in their order."""
    with _reading(tar, "a tar, or a compressed one"), tarfile.open(tar, "r:") as opened:
        for member in opened:
            if member.isfile():
                read = lambda member=member: opened.extractfile(member).read()
                yield member.name, member.offset_data, member.size, read
        # tarfile takes a header that is cut off for the end.
        opened.fileobj.seek(opened.offset)
        if opened.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.TarError("it ends in the middle of a member")


# Lhotse ----------------------------------------------------------------------------------------


def _shar_lines(path: str, cuts: list[Path]) -> Lines:
    """The cuts of a Lhotse Shar directory: the n-th of a shard is the n-th recording of its tar."""
    number = 0
    for file in cuts:
        tar = file.with_name(file.name.replace("cuts.", "recording.", 1)).with_suffix("")
        tar = tar.with_suffix(".tar")
        recordings = [m[:3] for m in _members(tar) if not m[0].endswith((".json", ".nometa"))]
        with _reading(file, "a gzip file"), gzip.open(file) as opened:
            told = [line for line in opened.read().split(b"\n") if line.strip()]
        for i, cut in enumerate(told):
            number += 1
            yield f"{path}:{number}", _cut_line(cut, tar, recordings[i : i + 1])
        if len(recordings) > len(told):
            reason = f"{len(recordings)} recordings for {len(told)} cuts"
            yield f"{tar}:{len(told) + 1}", {"damaged": reason}


def _cut_line(told: bytes, tar: Path, recording: list[tuple[str, int, int]]) -> dict:
    try:
        cut = json.loads(told)
        if not recording:
            raise ValueError(f"no recording is left for it in {tar}")
        ((name, offset, size),) = recording
        stem, _, ending = name.rpartition(".")
        if stem != cut["id"] or ending == "nodata":
            raise ValueError(f"cut {cut['id']!r}: {tar} has {name!r} in its place")
        spoken = cut.get("supervisions") or []
        first = spoken[0] if spoken else {}
        line = dict(cut.get("custom") or {}) | dict(first.get("custom") or {})
        line |= {"id": cut["id"], "duration": cut["duration"]}
        line["audio_filepath"] = embedded.slice_address(str(tar), offset, size)
        line["text"] = " ".join(s["text"].strip() for s in spoken if s.get("text"))
        given = {"lang": first.get("language"), "speaker": first.get("speaker")}
        line |= {name: x for name, x in given.items() if x}
        return line | ({"offset": cut["start"]} if cut.get("start") else {})
    except ValueError as error:
        return {"damaged": str(error)}
    except (KeyError, TypeError, AttributeError) as error:
        return {"damaged": f"not a cut as Lhotse writes it: {type(error).__name__}: {error}"}
