"""Where utterances come from: manifests in the NeMo convention, and data sets in ArrayRecord files.

A manifest is a text file with one JSON object a line:
`{"audio_filepath": "a/b.flac", "text": "hello", "duration": 1.23}`, optionally with `offset`
(seconds; the utterance is a part of the file), `lang`, `speaker`, `id` and `words`
([[word, start, end], ...] in seconds). Relative paths start at the manifest's folder. Paths may be
remote (`gs://...`) wherever etils.epath can open them.
"""

import concurrent.futures
import json
import math
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
import tqdm
from etils import epath

from otreg_jax.data import records

SAMPLE_RATE = 16000
THREADS = 16  # of readers that wait for files
ON_BAD_AUDIO = ("raise", "skip")
LONG_AUDIO = ("reject", "chunk")


class Utterance(NamedTuple):
    """One utterance: what to read and what it says."""

    id: str
    audio: str  # path of the audio file
    text: str
    duration: float  # seconds
    offset: float | None = None  # seconds into the file; None: the utterance is the whole file
    lang: str = ""
    speaker: str = ""
    where: str = ""  # "train.jsonl:12", for messages
    words: tuple = ()  # ((word, start, end), ...) in seconds from the utterance's start


# Which group an utterance belongs to, where groups are sampled by temperature.
MIXTURES = {
    "": lambda utterance: "all",
    "lang": lambda utterance: utterance.lang or "unknown",
    "corpus": lambda utterance: utterance.where.rpartition(":")[0],
}


class Problem(NamedTuple):
    """One reason why an utterance cannot be used."""

    kind: str  # "missing_file", "invalid_json", ...: what is counted
    where: str  # "train.jsonl:12"
    message: str


class BadAudio(ValueError):
    """Audio, or a manifest's line, that cannot be used.

    `kind` says why in a word that can be counted, `reason` in full; the message adds `where`.
    """

    def __init__(self, kind: str, reason: str, where: str = ""):
        super().__init__(f"{where}: {reason}" if where else reason)
        self.kind, self.reason = kind, reason


def read_manifest(
    path: str | os.PathLike, data_root: str = "", require_text: bool = True
) -> list[Utterance]:
    """Reads a manifest. Arguments and result as for `scan_manifest`.

    Raises:
      FileNotFoundError: there is no such manifest.
      ValueError: something is wrong with it; the message lists every problem with its line.
    """
    utterances, problems = scan_manifest(path, data_root, require_text)
    raise_problems(problems)
    return utterances


def scan(
    path: str, data_root: str = "", require_text: bool = True
) -> tuple[list[Utterance], list[Problem]]:
    """Reads a data set in ArrayRecord files (FOLDER, of which "train", or FOLDER:SPLIT) or else a
    manifest. Arguments, result and errors as for `scan_manifest` and `scan_records`."""
    split = split_of(path)
    return scan_records(*split) if split else scan_manifest(path, data_root, require_text)


def split_of(path: str) -> tuple[str, str] | None:
    """(folder, split) of a data set in ArrayRecord files, if `path` names one."""
    folder, _, split = path.rpartition(":")
    for place, part in ((path, "train"), (folder, split)):
        if os.path.exists(os.path.join(place, "dataset_info.json")):
            return place, part
    return None


def scan_manifest(
    path: str | os.PathLike, data_root: str = "", require_text: bool = True
) -> tuple[list[Utterance], list[Problem]]:
    """Reads a manifest, leaving aside the lines that cannot be used.

    The audio files must exist, but are opened only where a line has no duration.

    Args:
      path: the manifest, local or remote.
      data_root: folder at which relative audio paths start and which no path may leave; by default
        the manifest's own, and absolute paths are then taken as they are.
      require_text: whether a line without a transcript is a problem; noise has none.

    Returns:
      Utterances and problems, both in the order of the lines.
    """
    path = os.fspath(path)
    try:
        content = epath.Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such manifest") from None
    lines = (
        (f"{path}:{number}", line)
        for number, line in enumerate(content.split(b"\n"), start=1)
        if line.strip()
    )
    root = data_root or os.path.dirname(path) or "."
    utterances, problems = check_lines(lines, root, bool(data_root), require_text)
    if not utterances and not problems:
        problems.append(Problem("empty_manifest", f"{path}:0", "the manifest holds no utterance"))
    return utterances, problems


def check_lines(
    lines: Iterable[tuple[str, bytes | dict]], root: str, strict: bool, require_text: bool = True
) -> tuple[list[Utterance], list[Problem]]:
    """Utterances from (where, manifest line) pairs, and the problems of the others, in order.

    strict: absolute audio paths, too, must lie below root.
    """
    utterances, problems, order, first = [], [], {}, {}
    for where, line in lines:
        order[where] = len(order)
        try:
            utterance = _parse_line(line, where, root, strict, require_text)
            if utterance.id in first:
                before = first[utterance.id]
                raise BadAudio("duplicate_id", f"{utterance.id!r} stands already in {before}")
            first[utterance.id] = where
            utterances.append(utterance)
        except BadAudio as error:
            problems.append(Problem(error.kind, where, error.reason))
    utterances, missing = _split_missing(utterances)
    utterances, unreadable = _fill_durations(utterances)
    problems = sorted(problems + missing + unreadable, key=lambda problem: order[problem.where])
    return utterances, problems


def scan_records(folder: str, split: str) -> tuple[list[Utterance], list[Problem]]:
    """Reads the utterances of a TFDS data set in ArrayRecord files. Result as for `scan_manifest`.

    Raises:
      FileNotFoundError: there is no such split, or shards of it are missing.
      ValueError: the data set holds no audio or no transcripts.
    """
    lines = (
        (f"{folder}:{split}:{i}", {**line, "audio_filepath": records.address(folder, split, i)})
        for i, line in enumerate(records.read_index(folder, split))
    )
    return check_lines(lines, folder, strict=False)


def _parse_line(
    line: bytes | dict, where: str, root: str, strict: bool, require_text: bool
) -> Utterance:
    try:
        if isinstance(line, bytes):
            line = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadAudio("not_utf8", f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadAudio(
            "invalid_json", f"invalid JSON: {error.msg} (column {error.colno})"
        ) from None
    if not isinstance(line, dict):
        raise BadAudio("invalid_json", "the line is not a JSON object")
    if not require_text:
        line.setdefault("text", "")
    absent = [key for key in ("audio_filepath", "text") if not isinstance(line.get(key), str)]
    if absent:
        raise BadAudio("missing_key", f"no string under {' and '.join(map(repr, absent))}")
    times = {key: line.get(key) for key in ("duration", "offset")}
    for key, value in times.items():
        number = isinstance(value, int | float) and math.isfinite(value) and value >= 0
        if value is not None and not number:
            raise BadAudio("bad_value", f"{key} is {value!r}, not a number of seconds")
    if require_text and not line["text"].strip():
        raise BadAudio("empty_text", "the transcript is empty")
    path, offset = line["audio_filepath"], times["offset"]
    return Utterance(
        id=str(line.get("id") or (path if offset is None else f"{path}@{offset}")),
        audio=_resolve(path, root, strict),
        text=line["text"].strip(),
        duration=times["duration"] or 0.0,
        offset=offset,
        lang=str(line.get("lang") or ""),
        speaker=str(line.get("speaker") or ""),
        where=where,
        words=_word_times(line.get("words") or []),
    )


def _word_times(words) -> tuple[tuple[str, float, float], ...]:
    try:
        return tuple((str(word), float(start), float(end)) for word, start, end in words)
    except (TypeError, ValueError):
        raise BadAudio("bad_value", "words is not [[word, start, end], ...] in seconds") from None


def _resolve(audio: str, root: str, strict: bool) -> str:
    """The path of an audio file named in a manifest; relative paths must stay below root."""
    if "://" in audio or os.path.isabs(audio) or audio.startswith(records.PREFIX):
        inside = posixpath.normpath(audio).startswith(posixpath.normpath(root).rstrip("/") + "/")
        if strict and not inside:
            raise BadAudio("outside_root", f"{audio} lies outside of {root}")
        return audio
    if posixpath.normpath(audio).startswith(".."):
        raise BadAudio("outside_root", f"{audio} lies outside of {root}")
    return posixpath.join(root, audio)


def _split_missing(utterances: list[Utterance]) -> tuple[list[Utterance], list[Problem]]:
    """Sets aside utterances whose file does not exist; lists each folder once, in threads."""
    in_files = [u for u in utterances if not u.audio.startswith(records.PREFIX)]
    folders = sorted({posixpath.dirname(u.audio) for u in in_files})

    def names(folder):
        try:
            if "://" in folder:
                return {path.name for path in epath.Path(folder).iterdir()}
            return set(os.listdir(folder or "."))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        content = dict(zip(folders, pool.map(names, folders), strict=True))
    present, problems = [], []
    for utterance in utterances:
        folder, name = posixpath.split(utterance.audio)
        if utterance.audio.startswith(records.PREFIX) or name in content[folder]:
            present.append(utterance)
        else:
            message = f"audio file {utterance.audio} does not exist"
            problems.append(Problem("missing_file", utterance.where, message))
    return present, problems


def _fill_durations(utterances: list[Utterance]) -> tuple[list[Utterance], list[Problem]]:
    """Reads the duration from the audio file's header where the manifest does not give it."""
    without = [i for i, u in enumerate(utterances) if not u.duration]
    if not without:
        return utterances, []

    def read(i):
        utterance = utterances[i]
        try:
            with _open_audio(utterance.audio) as file:
                duration = file.frames / file.samplerate - (utterance.offset or 0.0)
            if duration <= 0:
                raise BadAudio("zero_length", f"{utterance.audio} holds no audio")
            return utterance._replace(duration=duration)
        except BadAudio as error:
            return Problem(error.kind, utterance.where, error.reason)

    filled, problems = list(utterances), []
    for i, outcome in zip(without, in_threads(read, without, "reading durations"), strict=True):
        filled[i] = outcome
    problems = [outcome for outcome in filled if isinstance(outcome, Problem)]
    return [outcome for outcome in filled if isinstance(outcome, Utterance)], problems


def in_threads(function: Callable, items: Sequence, label: str) -> list:
    """[function(item) for item in items], in threads, with a progress bar if it takes seconds."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(function, items)
        return list(tqdm.tqdm(results, desc=label, total=len(items), unit="utt", delay=2))


def _open_audio(path: str) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(epath.Path(path).open("rb") if "://" in path else path)
    except (soundfile.LibsndfileError, OSError) as error:
        reason = getattr(error, "error_string", str(error))
        raise BadAudio("unreadable", f"{path} cannot be read as audio: {reason}") from None


def from_file(path: str) -> Utterance:
    """An audio file as an utterance without a transcript. Raises BadAudio if it is unreadable."""
    utterances, problems = _fill_durations([Utterance(path, path, "", 0.0, where=path)])
    if problems:
        raise BadAudio(problems[0].kind, problems[0].message)
    return utterances[0]


def load_audio(utterance: Utterance, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Reads an utterance's audio as mono at `sample_rate`.

    Args:
      utterance: what to read; WAV, FLAC, Ogg or MP3 at any rate, with any number of channels.
      sample_rate: Hz.

    Returns:
      float32 [N] in [-1, 1], N no more than the manifest's duration.

    Raises:
      BadAudio (a ValueError): the file is unreadable, truncated or empty, holds NaN, or is shorter
        or longer by 0.1 s than the manifest says. The message names the file and the line.
    """
    try:
        return _load_audio(utterance, sample_rate)
    except BadAudio as error:
        raise BadAudio(error.kind, error.reason, utterance.where) from None


def _load_audio(utterance: Utterance, sample_rate: int) -> np.ndarray:
    path, duration = utterance.audio, utterance.duration
    from_records = path.startswith(records.PREFIX)
    audio, rate = records.read_audio(path) if from_records else _read_file(utterance)
    if from_records and utterance.offset is not None:
        start = round(utterance.offset * rate)
        audio = audio[start : start + round(duration * rate)]
    if audio.ndim == 2:
        audio = audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1)
    if not len(audio):
        raise BadAudio("zero_length", f"{path} holds no audio")
    seconds = len(audio) / rate
    if abs(seconds - duration) > 0.1:
        message = f"{path} holds {seconds:.2f} s of audio, the manifest says {duration:.2f} s"
        raise BadAudio("duration_mismatch", message + f" (its header says {rate} Hz)")
    if not np.isfinite(audio).all():
        raise BadAudio("nan_samples", f"{path} holds samples that are not finite")
    if rate != sample_rate:
        audio = soxr.resample(audio, rate, sample_rate)
    return audio[: round(duration * sample_rate)]


def _read_file(utterance: Utterance) -> tuple[np.ndarray, int]:
    """float32 [N, channels] and the rate of a file, or of the part of it that is the utterance."""
    path, offset = utterance.audio, utterance.offset
    with _open_audio(path) as file:
        rate = file.samplerate
        try:
            if offset is None:
                audio = file.read(dtype="float32", always_2d=True)
            else:
                file.seek(min(round(offset * rate), file.frames))
                audio = file.read(round(utterance.duration * rate), "float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise BadAudio("unreadable", f"{path} is damaged: {error.error_string}") from None
        if offset is None and 0 < len(audio) < file.frames:
            found = f"{len(audio)} of {file.frames} samples"
            raise BadAudio("unreadable", f"{path} is truncated: {found}")
    return audio, rate


def handle(
    problems: Iterable[Problem], on_bad_audio: str, skipped_path: str | os.PathLike | None
) -> None:
    """Raises a ValueError that lists the problems, or records them, as `on_bad_audio` asks."""
    if on_bad_audio not in ON_BAD_AUDIO:
        raise ValueError(f"data.on_bad_audio={on_bad_audio!r}: {' or '.join(ON_BAD_AUDIO)}")
    if on_bad_audio == "raise":
        raise_problems(list(problems))
    else:
        record_skipped(list(problems), skipped_path)


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises a ValueError that lists every problem, if there is one."""
    if problems:
        lines = [f"{p.where}: {p.message}" for p in problems]
        hint = "mend these lines, or set data.on_bad_audio=skip to leave them out"
        raise ValueError("\n".join([f"{count(problems)}; {hint}:", *lines]))


def count(problems: Iterable[Problem]) -> str:
    """'3 unusable utterances (missing_file 2, empty_text 1)'"""
    kinds = Counter(problem.kind for problem in problems)
    by_kind = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
    total = kinds.total()
    return f"{total} unusable utterance{'s' if total != 1 else ''} ({by_kind})"


def record_skipped(
    problems: Sequence[Problem], path: str | os.PathLike | None, note: str = "skipped"
) -> None:
    """Prints how many problems of which kind there are and appends them to a JSON-lines file."""
    if not problems:
        return
    print(f"{note} {count(problems)}" + (f": see {path}" if path else ""))
    if path:
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(problem._asdict(), ensure_ascii=False) + "\n" for problem in problems]
        if "://" in str(path):  # remote files cannot be appended to
            before = path.read_text() if path.exists() else ""
            path.write_text(before + "".join(lines))
        else:  # loader workers append side by side, and a long run one line at a time
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines)


def load_utterances(
    manifests: str, data_config, *, max_duration: float, skipped_path: str | None = None
) -> list[Utterance]:
    """Reads manifests and sets aside what cannot be used.

    Args:
      manifests: paths, as `scan` takes them, separated by commas.
      data_config: on_bad_audio ("raise" | "skip"), long_audio ("reject" | "chunk"), data_root.
      max_duration: seconds that the model can take.
      skipped_path: JSON-lines file to which what is set aside is appended.

    Returns:
      Utterances of at most `max_duration`. Longer ones are left out, counted and recorded; with
      long_audio="chunk" those with word times ("words") are divided between words instead, and the
      parts listed in segments.jsonl beside `skipped_path`.

    Raises:
      FileNotFoundError: a manifest does not exist.
      ValueError: on_bad_audio="raise" and a line cannot be used; lists all of them.
    """
    scans = [scan(path.strip(), data_config.data_root) for path in manifests.split(",")]
    handle([p for _, problems in scans for p in problems], data_config.on_bad_audio, skipped_path)
    if data_config.long_audio not in LONG_AUDIO:
        raise ValueError(f"data.long_audio={data_config.long_audio!r}: {' or '.join(LONG_AUDIO)}")
    kept, segments, refused = [], [], []
    for utterance in (u for utterances, _ in scans for u in utterances):
        if utterance.duration <= max_duration:
            kept.append(utterance)
            continue
        divide = data_config.long_audio == "chunk" and utterance.words
        for part in chunk(utterance, max_duration) if divide else [utterance]:
            if part.duration <= max_duration:
                segments.append(part)
            else:
                length = f"{part.id} is {part.duration:.2f} s long, over {max_duration:g} s"
                refused.append(Problem("too_long", part.where, length))
    record_skipped(refused, skipped_path, note="refused")
    if segments and skipped_path:
        path = epath.Path(skipped_path).with_name("segments.jsonl")
        write_manifest(path, segments)
        print(f"divided long audio into {len(segments)} segments: see {path}")
    return kept + segments


def chunk(utterance: Utterance, max_duration: float) -> list[Utterance]:
    """Divides an utterance with word times into parts of at most `max_duration` seconds.

    The cuts lie in the middle of the pauses between words, each as late as the limit allows. A word
    that is longer than the limit gets a part of its own, which is longer too.
    """
    _, starts, ends = zip(*utterance.words, strict=True)
    cuts = [(end + start) / 2 for end, start in zip(ends, starts[1:], strict=False)]
    edges = [0.0, *cuts, utterance.duration]  # edges[i], edges[i + 1]: around word i
    parts, first = [], 0
    for i in range(1, len(edges)):
        last = i == len(edges) - 1
        if last or edges[i + 1] - edges[first] > max_duration:
            parts.append((first, i))
            first = i
    return [_part(utterance, edges[a], edges[b], utterance.words[a:b]) for a, b in parts]


def _part(utterance: Utterance, start: float, end: float, words) -> Utterance:
    offset = (utterance.offset or 0.0) + start
    return utterance._replace(
        id=f"{utterance.id}@{offset:.3f}",
        text=" ".join(word for word, _, _ in words),
        offset=offset,
        duration=end - start,
        words=tuple((word, a - start, b - start) for word, a, b in words),
    )


def write_manifest(path: str | os.PathLike, utterances: Iterable[Utterance]) -> None:
    """Writes utterances as a manifest, with absolute audio paths."""
    lines = []
    for utterance in utterances:
        line = utterance._asdict()
        del line["where"]
        audio = line.pop("audio")
        line["audio_filepath"] = audio if "://" in audio else os.path.abspath(audio)
        given = {key: value for key, value in line.items() if value not in (None, "", ())}
        lines.append(json.dumps(given, ensure_ascii=False) + "\n")
    epath.Path(path).write_text("".join(lines))
