"""Data sets of other tools, read where they lie, as lines of a manifest.

    Kaldi, ESPnet   a directory with wav.scp and text; segments, utt2spk, utt2lang, utt2dur
    Hugging Face    a directory that `datasets` saved (DIR, of several splits DIR:train), a Parquet
                    file, or a directory of them (DIR:train: those whose names begin so)
    WebDataset      a tar, a directory of tars, or "train-{000..015}.tar"
    Lhotse Shar     a directory with cuts.*.jsonl.gz and recording.*.tar

Each reader gives (where, line) in the order of the source; `where` is the set and the row, from 1.
Audio stays where it is, see `embedded`. Nothing in a data set is run: pipes in wav.scp are refused.
"""

import gzip
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from otreg_jax.data import embedded
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
    if tars := _files(place, "*.tar") or _braces(path):
        return lambda: _tar_lines(path, tars)
    return None


def _files(place: Path, pattern: str, below: str = "") -> list[Path]:
    """The file itself, or those of a directory, that fit the pattern, in the order of names."""
    if place.is_file():
        return [place] if place.match(pattern) else []
    return sorted(place.glob(below + pattern)) if place.is_dir() else []


def _braces(path: str) -> list[Path]:
    """ "train-{000..003}.tar" as its files; those that are missing too, to be named."""
    found = _BRACES.search(path)
    if not found or not path.endswith(".tar"):
        return []
    first, last = found.groups()
    names = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [Path(path[: found.start()] + name + path[found.end() :]) for name in names]


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
                line["duration"] = float(line["duration"])
            if listed == "segments":
                recording, start, end = value.split()
                line |= {"offset": float(start), "duration": float(end) - float(start)}
                value = recordings[recording]
            line["audio_filepath"] = _scp_path(value, folder)
        except KeyError:
            line = {"damaged": f"recording {recording!r} stands not in wav.scp"}
        except ValueError as error:
            line = {"damaged": str(error)}
        yield f"{folder / listed}:{number}", line
    known = {key for key, *_ in tables[listed]}
    for key, _, number in tables["text"]:
        if key not in known:
            yield f"{folder / 'text'}:{number}", {"damaged": f"{key!r} stands not in {listed}"}


def _table(path: Path) -> list[tuple[str, str, int]]:
    """(key, value, line number) of a Kaldi table; empty if there is no such file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
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
        folder = folder / (split or "train")
    elif split:
        return None
    return folder if (folder / "state.json").is_file() else None


def _arrow_lines(path: str, folder: Path) -> Lines:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    files = [str(folder / entry["filename"]) for entry in state["_data_files"]]
    rows = [(file, row) for file in files for row in range(embedded.arrow(file).num_rows)]
    for entry in state.get("_indices_files") or ():  # what select, filter or shuffle left
        indices = embedded.arrow(str(folder / entry["filename"]))["indices"].to_pylist()
        rows = [rows[i] for i in indices]
    tables = {file: _plain(embedded.arrow(file)) for file in files}
    audio = _audio_column(embedded.arrow(files[0]).schema, path) if files else ""
    for number, (file, row) in enumerate(rows, start=1):
        told = {name: column[row].as_py() for name, column in tables[file].items()}
        yield f"{path}:{number}", _cell_line(told, file, row, audio, path, number)


def _parquet_lines(path: str, files: list[Path]) -> Lines:
    import pyarrow.parquet

    number = 0
    for file in files:
        table, row = pyarrow.parquet.ParquetFile(file), 0
        audio = _audio_column(table.schema_arrow, str(file))
        is_struct = pyarrow.types.is_struct(table.schema_arrow.field(audio).type)
        names = [name for name in _plain(table.schema_arrow.empty_table()) if name != audio]
        names.append(f"{audio}.path" if is_struct else audio)
        for batch in table.iter_batches(columns=names):
            for told in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", _cell_line(told, str(file), row, audio, path, number)
                row += 1


def _plain(table) -> dict:
    """The columns of a table that hold texts, numbers or lists of texts, and paths of audio."""
    import pyarrow.compute
    import pyarrow.types as types

    def is_plain(kind):
        of_list = types.is_list(kind) and types.is_string(kind.value_type)
        number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        return of_list or number or types.is_string(kind) or types.is_large_string(kind)

    found = {field.name: table[field.name] for field in table.schema if is_plain(field.type)}
    for field in table.schema:
        if types.is_struct(field.type) and {"bytes", "path"} <= {*field.type.names}:
            found[field.name] = pyarrow.compute.struct_field(table[field.name], "path")
    return found


def _audio_column(schema, where: str) -> str:
    import pyarrow.types as types

    structs = [f.name for f in schema if types.is_struct(f.type) and "bytes" in f.type.names]
    found = structs + [name for name in ("audio", "audio_filepath", "file") if name in schema.names]
    if not found:
        raise ValueError(f"{where}: no column holds audio; there are {', '.join(schema.names)}")
    return found[0]


def _cell_line(told: dict, file: str, row: int, audio: str, path: str, number: int) -> dict:
    line = {_known(name): x for name, x in told.items() if x is not None and name != "id"}
    given = told.get(audio)
    given = given.get("path") if isinstance(given, dict) else given
    local = given and str((Path(file).parent / given).absolute())
    is_file = isinstance(given, str) and os.path.isfile(local)
    line.pop(audio, None)
    line["audio_filepath"] = local if is_file else embedded.cell_address(file, row, audio)
    return line | {"id": f"{path}:{number}"}  # ids of these sets name sentences, not recordings


def _known(name: str) -> str:
    """The name that a column of published data sets has in a manifest."""
    for known, names in (("text", TEXT), ("lang", LANG), ("speaker", SPEAKER)):
        if name in names:
            return known
    return name


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
            line |= {_known(name): x for name, x in told.items() if name != "id"}
        elif ending in (".txt", ".text", ".transcript"):
            line["text"] = data().decode("utf-8").strip()
        else:
            line.setdefault(ending, True)  # named as not used
    except (ValueError, AttributeError) as error:
        line["damaged"] = f"{tar}: {line['id']}{ending}: {error}"


def _members(tar: Path) -> Iterator[tuple[str, int, int, Callable[[], bytes]]]:
    """(name, offset, size, what reads it) of the files of a tar, in their order."""
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                if member.isfile():
                    read = lambda member=member: opened.extractfile(member).read()
                    yield member.name, member.offset_data, member.size, read
    except FileNotFoundError:
        raise FileNotFoundError(f"{tar}: no such file") from None
    except tarfile.TarError as error:
        raise ValueError(f"{tar}: not a tar, or a compressed or damaged one: {error}") from None


# Lhotse ----------------------------------------------------------------------------------------


def _shar_lines(path: str, cuts: list[Path]) -> Lines:
    """The cuts of a Lhotse Shar directory: the n-th of a shard is the n-th recording of its tar."""
    number = 0
    for file in cuts:
        tar = file.with_name(file.name.replace("cuts.", "recording.", 1)).with_suffix("")
        tar = tar.with_suffix(".tar")
        recordings = [
            m for m in _members(tar) if not m[0].endswith((".json", ".nodata", ".nometa"))
        ]
        with gzip.open(file, "rt", encoding="utf-8") as opened:
            told = [json.loads(line) for line in opened if line.strip()]
        for i, cut in enumerate(told):
            number += 1
            if i >= len(recordings):
                line = {"damaged": f"{tar}: {len(recordings)} recordings for {len(told)} cuts"}
            else:
                line = _cut_line(cut, str(tar), *recordings[i][1:3])
            yield f"{path}:{number}", line


def _cut_line(cut: dict, tar: str, offset: int, size: int) -> dict:
    spoken = cut.get("supervisions", [])
    first = spoken[0] if spoken else {}
    line = dict(cut.get("custom") or {}) | dict(first.get("custom") or {})
    line = {name: x for name, x in line.items() if isinstance(x, str | int | float | list)}
    line |= {"id": cut["id"], "duration": cut["duration"]}
    line["audio_filepath"] = embedded.slice_address(tar, offset, size)
    line["text"] = " ".join(s["text"].strip() for s in spoken if s.get("text"))
    given = {"lang": first.get("language"), "speaker": first.get("speaker")}
    line |= {name: x for name, x in given.items() if x}
    return line | ({"offset": cut["start"]} if cut.get("start") else {})
