"""Manifests in the NeMo convention: lines to utterances, and what is wrong with a line.

A manifest is a text file with one JSON object a line:
`{"audio_filepath": "a/b.flac", "text": "hello", "duration": 1.23}`, optionally with `offset`
(seconds; the utterance is a part of the file), `lang`, `speaker`, `id` and `words`
([[word, start, end], ...] in seconds), and whatever the run's tasks and prompts name: `task` (NeMo:
`taskname`), `answer`, `target_text`, `target_lang`, `context`, ... Relative paths start at the
manifest's folder. Paths may be remote (`gs://...`).
"""

import concurrent.futures
import functools
import json
import os
import posixpath
from collections.abc import Iterable, Iterator

from etils import epath

from otreg_jax.data import audio, embedded, records, remote
from otreg_jax.data.utterances import THREADS, BadAudio, Problem, Utterance, raise_problems

# Other names under which manifests give the language of the text, the first found counts.
LANGUAGE_COLUMNS = ("lang", "language", "locale", "lang_id", "target_lang", "source_lang")
COLUMNS = set("audio_filepath text duration offset speaker id words".split())
TASK_COLUMNS = ("task", "taskname")
ANSWER_COLUMNS = ("target_text", "answer")  # the row's text is then what is heard
LONGEST = 1e7  # seconds, four months: nobody's recording


def read_manifest(
    path: str | os.PathLike, data_root: str = "", require_text: bool = True
) -> list[Utterance]:
    """Reads a manifest. Arguments and result as for `scan_manifest`.

    Raises:
      OSError: there is no such manifest, or what it names lies in a bucket that does not answer.
      ValueError: something is wrong with it; the message lists every problem with its line.
    """
    utterances, problems = scan_manifest(path, data_root, require_text)
    raise_problems(problems)
    return utterances


def scan_manifest(
    path: str | os.PathLike,
    data_root: str = "",
    require_text: bool = True,
    columns: frozenset[str] | None = frozenset(),
) -> tuple[list[Utterance], list[Problem]]:
    """Reads a manifest, leaving aside the lines that cannot be used.

    The audio files must exist, but are opened only where a line has no duration. Columns that
    nothing here reads are named once.

    Args:
      path: the manifest, local or remote.
      data_root: folder at which relative audio paths start and which no path may leave; by default
        the manifest's own, and absolute paths are then taken as they are.
      require_text: whether a line without a transcript is a problem; noise has none.
      columns: further columns that are kept, as an utterance's `fields`; None: all that a template
        could name.

    Returns:
      Utterances and problems, both in the order of the lines.

    Raises:
      OSError: there is no such manifest, or what it names lies in a bucket that does not answer.
    """
    path = remote.localize(os.fspath(path))
    remote.check([path], "the manifest lies there")
    root = remote.localize(data_root) or os.path.dirname(path) or "."
    strict = bool(data_root)
    utterances, problems = check_lines(_lines(path), root, strict, require_text, columns)
    if not utterances and not problems:
        problems.append(Problem("empty_manifest", f"{path}:0", "the manifest holds no utterance"))
    return utterances, problems


def _lines(path: str) -> Iterator[tuple[str, bytes]]:
    """(where, line) of a manifest's lines that are not blank. One at a time: all of them may be
    more than the memory holds."""
    try:
        with epath.Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.removesuffix(b"\n")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        raise FileNotFoundError(f"{path}: no such manifest") from None
    except OSError as error:
        raise OSError(f"{path}: the manifest cannot be read: {error.strerror or error}") from None


def check_lines(
    lines: Iterable[tuple[str, bytes | dict]],
    root: str,
    strict: bool,
    require_text: bool = True,
    columns: frozenset[str] | None = frozenset(),
) -> tuple[list[Utterance], list[Problem]]:
    """Utterances from (where, manifest line) pairs, and the problems of the others, in order.

    A line is text or what it would say; {"damaged": reason} is what an index says of a record.
    strict: absolute audio paths, too, must lie below root.
    """
    utterances, problems, order, first, unused = [], [], {}, {}, set()
    for where, line in lines:
        order[where] = len(order)
        try:
            line = _decode(line) if isinstance(line, bytes) else dict(line)
            if isinstance(line.get("damaged"), str):
                raise BadAudio("unreadable", line["damaged"])
            given = {key: value for key, value in line.items() if value not in (None, "", [])}
            kept = _nameable(line) if columns is None else columns
            unused |= given.keys() - {*COLUMNS, *_language(given, kept), *kept}
            utterance = _parse(line, where, root, strict, require_text, kept)
            if utterance.id in first:
                before = first[utterance.id]
                raise BadAudio("duplicate_id", f"{utterance.id!r} stands already in {before}")
            first[utterance.id] = where
            utterances.append(utterance)
        except BadAudio as error:
            problems.append(Problem(error.kind, where, error.reason))
    if unused:
        names = sorted(map(_short, unused))
        shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
        print(f"{next(iter(order)).rpartition(':')[0]}: columns that are not used: {shown}")
    utterances, missing = _split_missing(utterances)
    utterances, unreadable = audio.fill_durations(utterances)
    utterances, untimely = _split_untimely(utterances)
    problems += missing + unreadable + untimely
    return utterances, sorted(problems, key=lambda problem: order[problem.where])


def _decode(line: bytes) -> dict:
    try:
        # Some editors begin a file with a byte order mark.
        found = json.loads(line.decode("utf-8-sig"), parse_int=_integer, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadAudio("not_utf8", f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadAudio(
            "invalid_json", f"invalid JSON: {error.msg} (column {error.colno})"
        ) from None
    except RecursionError:
        raise BadAudio("invalid_json", "invalid JSON: brackets within brackets, too many") from None
    if not isinstance(found, dict):
        raise BadAudio("invalid_json", "the line is not a JSON object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 100:
        raise BadAudio("bad_value", f"a number of {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({_short(key) for key in keys if keys.count(key) > 1})
        raise BadAudio("invalid_json", f"more than once: {', '.join(twice)}")
    return found


def _language(line: dict, columns: frozenset[str]) -> list[str]:
    """The columns of a line that give the language of its text: the first one that is there, and
    those that say the same."""
    first = line.keys() & columns & {*ANSWER_COLUMNS} and "source_lang"
    names = sorted(LANGUAGE_COLUMNS, key=lambda name: name != first)
    found = [name for name in names if line.get(name)]
    return [name for name in found if line[name] == line[found[0]]]


def _parse(line: dict, where: str, root, strict, require_text, columns) -> Utterance:
    fields = tuple((key, _field(line, key)) for key in _extra(columns) if line.get(key) is not None)
    if line.get("text") == "" and "text" in columns:
        fields += (("text", ""),)  # it is there: silence
    if not require_text:
        line.setdefault("text", "")
    absent = [key for key in ("audio_filepath", "text") if not isinstance(line.get(key), str)]
    if absent:
        raise BadAudio("missing_key", f"no string under {' and '.join(map(repr, absent))}")
    path, text = _string(line, "audio_filepath"), _string(line, "text").strip()
    duration, offset = _seconds(line, "duration"), _seconds(line, "offset")
    if duration == 0:
        raise BadAudio("zero_length", "duration is 0")
    if require_text and not text:
        raise BadAudio("empty_text", "the transcript is empty")
    for key in LANGUAGE_COLUMNS:
        _string(line, key)
    lang = next((line[key].strip() for key in _language(line, columns)), "")
    return Utterance(
        id=_name(line, "id") or (path if offset is None else f"{path}@{offset}"),
        audio=_resolve(path, root, strict),
        text=text,
        duration=duration or 0.0,
        offset=offset,
        lang=lang,
        speaker=_name(line, "speaker"),
        where=where,
        words=_word_times(line.get("words")),
        task=next((_string(line, key) for key in TASK_COLUMNS if key in columns & line.keys()), ""),
        fields=fields,
    )


@functools.cache
def _extra(columns: frozenset[str]) -> tuple[str, ...]:
    """Those of the columns that an utterance has no place of its own for."""
    return tuple(sorted(columns - COLUMNS - {"lang", *TASK_COLUMNS}))


def _nameable(line: dict) -> frozenset[str]:
    """The columns of a line that a template could name."""
    return frozenset(key for key, value in line.items() if _is_field(value))


def _is_field(value) -> bool:
    """Whether it is a text, a number or a list of texts."""
    is_list = isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)
    return is_list or isinstance(value, str | int | float)


def _field(line: dict, key: str) -> str | int | float | tuple[str, ...]:
    """What a column holds that a template may name."""
    value = line[key]
    if not _is_field(value):
        kinds = "a text, a number or a list of texts"
        raise BadAudio("bad_value", f"{key} is {_short(value)}, not {kinds}")
    if isinstance(value, list | tuple):
        return tuple(_whole(x.strip(), key) for x in value if x.strip())
    return _whole(value.strip(), key) if isinstance(value, str) else value


def _string(line: dict, key: str) -> str:
    value = line.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadAudio("bad_value", f"{key} is {_short(value)}, not a string")
    return _whole(value, key)


def _whole(text: str, key: str) -> str:
    """The text, if all of it can be written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half a character ({text[error.start]!r}) at {error.start}"
        raise BadAudio("bad_value", f"{key} holds {half}") from None
    return text


def _name(line: dict, key: str) -> str:
    """A string, or a whole number as one."""
    value = line.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _string(line, key)


def _seconds(line: dict, key: str) -> float | None:
    value = line.get(key)
    if value is None:
        return None
    if not _is_time(value) or value < 0:
        raise BadAudio("bad_value", f"{key} is {_short(value)}, not a number of seconds")
    return value


def _is_time(value) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -LONGEST <= value <= LONGEST  # false for NaN


def _word_times(words) -> tuple[tuple[str, float, float], ...]:
    if words is None:
        return ()
    entries = words if isinstance(words, list | tuple) else [None]
    for entry in entries:
        if not (
            isinstance(entry, list | tuple)
            and len(entry) == 3
            and isinstance(entry[0], str)
            and _is_time(entry[1])
            and _is_time(entry[2])
        ):
            raise BadAudio(
                "bad_value", f"words is not [[word, start, end], ...] in seconds: {_short(entry)}"
            )
    return tuple((_whole(word, "words"), float(start), float(end)) for word, start, end in entries)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_inside(path: str) -> bool:
    """Whether audio is a record or a part of another file."""
    return path.startswith(records.PREFIX) or embedded.is_address(path)


def _resolve(path: str, root: str, strict: bool) -> str:
    """The path of an audio file named in a manifest; relative paths must stay below root."""
    if "\0" in path or not path.strip():
        raise BadAudio("bad_value", f"audio_filepath is {_short(path)}, not a path")
    try:
        path = path if _is_inside(path) else remote.localize(path)
    except ValueError as error:
        raise BadAudio("bad_value", str(error)) from None
    if "://" in path or os.path.isabs(path) or _is_inside(path):
        inside = posixpath.normpath(path).startswith(posixpath.normpath(root).rstrip("/") + "/")
        if strict and not inside:
            raise BadAudio("outside_root", f"{path} lies outside of {root}")
        return path
    if posixpath.normpath(path).split("/")[0] == "..":
        raise BadAudio("outside_root", f"{path} lies outside of {root}")
    return posixpath.join(root, path)


def _split_missing(utterances: list[Utterance]) -> tuple[list[Utterance], list[Problem]]:
    """Sets aside utterances whose file does not exist; lists each folder once, in threads."""
    in_files = [u for u in utterances if not _is_inside(u.audio)]
    if in_files:
        count = f"{len(in_files)} utterances, from {in_files[0].where} on, name files"
        remote.check((u.audio for u in in_files), f"{count}; audio lies there")
    folders = sorted({posixpath.dirname(u.audio) for u in in_files})

    def names(folder):
        try:
            if "://" in folder:
                return {path.name for path in epath.Path(folder).iterdir()}, ""
            return set(os.listdir(folder or ".")), ""
        except (FileNotFoundError, NotADirectoryError):
            return set(), ""
        except OSError as error:
            return set(), f": its folder cannot be read: {error.strerror or error}"

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        content = dict(zip(folders, pool.map(names, folders), strict=True))
    present, problems = [], []
    for utterance in utterances:
        folder, name = posixpath.split(utterance.audio)
        there, why = content.get(folder, ((), ""))
        if _is_inside(utterance.audio) or name in there:
            present.append(utterance)
        else:
            message = f"audio file {utterance.audio} does not exist{why}"
            problems.append(Problem("missing_file", utterance.where, message))
    return present, problems


def _split_untimely(utterances: list[Utterance]) -> tuple[list[Utterance], list[Problem]]:
    """Sets aside utterances whose word times run backwards or leave the recording."""
    timely, problems = [], []
    for utterance in utterances:
        wrong = _untimely(utterance)
        if wrong:
            problems.append(Problem("bad_value", utterance.where, wrong))
        else:
            timely.append(utterance)
    return timely, problems


def _untimely(utterance: Utterance) -> str:
    last = (0.0, 0.0)
    for word, start, end in utterance.words:
        shown = f"words: {_short(word)} lies at {start:g} to {end:g} s"
        if not 0 <= start <= end:
            return f"{shown}"
        if start < last[0] or end < last[1]:
            return f"{shown}, before the word that it follows"
        if end > utterance.duration + audio.TOLERANCE:
            return f"{shown}, the audio is {utterance.duration:.2f} s long"
        last = (start, end)
    return ""


def write_manifest(path: str | os.PathLike, utterances: Iterable[Utterance]) -> None:
    """Writes utterances as a manifest, with absolute audio paths."""
    epath.Path(path).write_text(as_text(utterances))


def as_text(utterances: Iterable[Utterance]) -> str:
    """What `write_manifest` writes."""
    lines = []
    for utterance in utterances:
        line = utterance._asdict()
        del line["where"]
        line = dict(line.pop("fields")) | line
        path_of_audio = line.pop("audio")
        elsewhere = "://" in path_of_audio or _is_inside(path_of_audio)
        line["audio_filepath"] = path_of_audio if elsewhere else os.path.abspath(path_of_audio)
        given = {key: value for key, value in line.items() if value not in (None, "", ())}
        lines.append(json.dumps(given, ensure_ascii=False) + "\n")
    return "".join(lines)
