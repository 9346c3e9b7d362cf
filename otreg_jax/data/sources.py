"""Where utterances come from: manifests, and data sets in ArrayRecord files.

The one place that the rest of the project asks for utterances and their audio; how manifests are
read stands in `manifest`, how audio is in `audio`.
"""

import itertools
import re

from etils import epath

from otreg_jax.data import manifest, readers, records, remote
from otreg_jax.data.audio import SAMPLE_RATE, from_file, load_audio
from otreg_jax.data.manifest import read_manifest, scan_manifest, write_manifest
from otreg_jax.data.utterances import (
    ON_BAD_AUDIO,
    BadAudio,
    Found,
    Problem,
    Utterance,
    count,
    handle,
    in_threads,
    may_skip,
    record_skipped,
    too_long,
)

__all__ = [
    "LONG_AUDIO",
    "MIXTURES",
    "ON_BAD_AUDIO",
    "SAMPLE_RATE",
    "BadAudio",
    "Found",
    "Problem",
    "Utterance",
    "chunk",
    "count",
    "find_utterances",
    "from_file",
    "handle",
    "in_threads",
    "load_audio",
    "load_utterances",
    "may_skip",
    "read_manifest",
    "record_skipped",
    "scan",
    "scan_manifest",
    "split_of",
    "tell",
    "word_spans",
    "write_manifest",
]

LONG_AUDIO = ("reject", "chunk")
# Which group an utterance belongs to, where groups are sampled by temperature.
MIXTURES = {
    "": lambda utterance: "all",
    "lang": lambda utterance: utterance.lang or "unknown",
    "corpus": lambda utterance: utterance.where.rpartition(":")[0],
}


def scan(
    path: str,
    data_root: str = "",
    require_text: bool = True,
    columns: frozenset[str] | None = frozenset(),
) -> tuple[list[Utterance], list[Problem]]:
    """Reads a data set of another tool (see `readers`), one in ArrayRecord files (FOLDER, of which
    "train", or FOLDER:SPLIT), or else a manifest. Arguments, result and errors as for
    `scan_manifest` and `scan_records`."""
    path = remote.localize(path)
    remote.check([path], f"{path} lies there")
    if reader := readers.find(path):
        return manifest.check_lines(reader(), path, False, require_text, columns)
    split = split_of(path)
    if split:
        return scan_records(*split, require_text, columns)
    return scan_manifest(path, data_root, require_text, columns)


def split_of(path: str) -> tuple[str, str] | None:
    """(folder, split) of a data set in ArrayRecord files, if `path` names one."""
    folder, _, split = path.rpartition(":")
    for place, part in ((path, "train"), (folder, split)):
        if place and records.is_data_set(place):
            return place, part
    return None


def scan_records(
    folder: str,
    split: str,
    require_text: bool = True,
    columns: frozenset[str] | None = frozenset(),
) -> tuple[list[Utterance], list[Problem]]:
    """Reads the utterances of a TFDS data set in ArrayRecord files. Arguments and result as for
    `scan_manifest`.

    Raises:
      FileNotFoundError: there is no such split, or shards of it are missing.
      ValueError: the data set holds no audio or no transcripts.
    """
    lines = (
        (f"{folder}:{split}:{i}", {**line, "audio_filepath": records.address(folder, split, i)})
        for i, line in enumerate(records.read_index(folder, split))
    )
    return manifest.check_lines(lines, folder, False, require_text, columns)


def load_utterances(
    manifests: str, data_config, *, max_duration: float, skipped_path: str | None = None, **options
) -> list[Utterance]:
    """`find_utterances`, told: the utterances."""
    found = find_utterances(manifests, data_config, max_duration=max_duration, **options)
    tell(found, skipped_path)
    return list(found.utterances)


def tell(found: Found, skipped_path: str | None) -> None:
    """Prints how many utterances are left out and appends them to a JSON-lines file, if one is
    given, beside which the parts of divided audio are listed in segments.jsonl."""
    for note, problems in found.told:
        record_skipped(problems, skipped_path, note)
    if found.segments and skipped_path:
        path = epath.Path(skipped_path).with_name("segments.jsonl")
        path.write_text(found.segments)
        parts = found.segments.count("\n")
        print(f"divided long audio into {parts} segments: see {path}")


def find_utterances(
    manifests: str,
    data_config,
    *,
    max_duration: float,
    require_text: bool = True,
    columns: frozenset[str] = frozenset(),
) -> Found:
    """Reads manifests and sets aside what cannot be used.

    Args:
      manifests: paths, as `scan` takes them, separated by commas.
      data_config: on_bad_audio ("raise" | "skip"), long_audio ("reject" | "chunk"), data_root.
      max_duration: seconds that the model can take.
      require_text, columns: as for `scan_manifest`.

    Returns:
      Utterances of at most `max_duration`. Longer ones are left out; with long_audio="chunk" those
      with word times ("words") are divided between words instead.

    Raises:
      FileNotFoundError: a manifest does not exist.
      ValueError: on_bad_audio="raise" and a line cannot be used; lists all of them.
    """
    root = data_config.data_root
    scans = [scan(p.strip(), root, require_text, columns) for p in manifests.split(",")]
    problems = may_skip((p for _, found in scans for p in found), data_config.on_bad_audio)
    if data_config.long_audio not in LONG_AUDIO:
        raise ValueError(f"data.long_audio={data_config.long_audio!r}: {' or '.join(LONG_AUDIO)}")
    kept, segments, refused = [], [], []
    for utterance in (u for utterances, _ in scans for u in utterances):
        if not too_long(utterance, max_duration):
            kept.append(utterance)
            continue
        parts, why = [utterance], ""
        has_answer = {*manifest.ANSWER_COLUMNS} & dict(utterance.fields).keys()  # to all of it
        if data_config.long_audio == "chunk" and utterance.words and not has_answer:
            parts = chunk(utterance, max_duration) or parts
            why = "" if len(parts) > 1 else ", and `words` are not those of its text"
        for part in parts:
            if problem := too_long(part, max_duration, why):
                refused.append(problem)
            else:
                segments.append(part)
    told = [("skipped", problems), ("refused", refused)]
    return Found(kept + segments, told, manifest.as_text(segments))


def chunk(utterance: Utterance, max_duration: float) -> list[Utterance]:
    """Divides an utterance with word times into parts of at most `max_duration` seconds.

    The cuts lie in the middle of the pauses between words, each as late as the limit allows. A word
    that is longer than the limit gets a part of its own, which is longer too. The parts keep the
    spelling of the transcript. No part comes back if its words are not those that are timed.
    """
    spans = word_spans(utterance)
    if not spans:
        return []
    _, starts, ends = zip(*utterance.words, strict=True)
    cuts = [(end + start) / 2 for end, start in zip(ends, starts[1:], strict=False)]
    edges = [0.0, *(min(cut, utterance.duration) for cut in cuts), utterance.duration]
    # edges[i], edges[i + 1]: around word i
    parts, first = [], 0
    for i in range(1, len(edges)):
        last = i == len(edges) - 1
        if last or edges[i + 1] - edges[first] > max_duration:
            parts.append((first, i))
            first = i
    text = lambda a, b: utterance.text[spans[a][0] : spans[b - 1][1]]
    return [
        _part(utterance, edges[a], edges[b], utterance.words[a:b], text(a, b)) for a, b in parts
    ]


def word_spans(utterance: Utterance) -> list[tuple[int, int]]:
    """Where each entry of `words` stands in the text: as many words, or else the same letters."""
    entries, text = [word.split() for word, _, _ in utterance.words], utterance.text
    words = [found.span() for found in re.finditer(r"\S+", text)]
    letters = [(i, i + 1) for i, letter in enumerate(text) if not letter.isspace()]
    if sum(map(len, entries)) == len(words):
        sizes, units = list(map(len, entries)), words
    elif "".join(sum(entries, [])) == "".join(text.split()):
        sizes, units = [len("".join(entry)) for entry in entries], letters
    else:
        return []
    ends = list(itertools.accumulate(sizes))
    groups = [units[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    at = 0
    spans = []
    for group in groups:
        spans.append((group[0][0], group[-1][1]) if group else (at, at))
        at = spans[-1][1]
    return spans


def _part(utterance: Utterance, start: float, end: float, words, text: str) -> Utterance:
    offset = (utterance.offset or 0.0) + start
    return utterance._replace(
        id=f"{utterance.id}@{offset:.3f}",
        text=text,
        offset=offset,
        duration=end - start,
        words=tuple((word, a - start, b - start) for word, a, b in words),
    )
