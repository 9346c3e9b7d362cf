"""What is read and what is wrong with it: utterances, problems, and how problems are told."""

import concurrent.futures
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import tqdm

from otreg_jax import rundir

SAMPLE_RATE = 16000  # of all audio once it is read, mono
THREADS = 16  # of readers that wait for files
ON_BAD_AUDIO = ("raise", "skip")


class Utterance(NamedTuple):
    """One utterance: what to read and what it says."""

    id: str
    audio: str  # path of the audio file, or address of a record
    text: str  # the transcript; "" also where only another answer is known
    duration: float  # seconds
    offset: float | None = None  # seconds into the file; None: the utterance is the whole file
    lang: str = ""
    speaker: str = ""
    where: str = ""  # "train.jsonl:12", for messages
    words: tuple = ()  # ((word, start, end), ...) in seconds from the utterance's start
    task: str = ""  # what is asked of it, see `prompts`; "": what the run's first task asks
    fields: tuple = ()  # ((column, value), ...) of its row, those that templates name


class Problem(NamedTuple):
    """One reason why an utterance cannot be used."""

    kind: str  # "missing_file", "invalid_json", ...: what is counted
    where: str  # "train.jsonl:12"
    message: str


class Found(NamedTuple):
    """What a data set holds.

    told: (what became of them, problems), of utterances that are left out. segments: as a manifest,
      the parts of audio that was divided.
    """

    utterances: Sequence[Utterance]
    told: list[tuple[str, list[Problem]]]
    segments: str = ""


def too_long(utterance: Utterance, longest: float, why: str = "") -> Problem | None:
    """The problem with an utterance of more than `longest` seconds: audio is refused, never cut.

    why: what else the message says.
    """
    if utterance.duration <= longest:
        return None
    length = f"{utterance.id} is {utterance.duration:.2f} s long, over {longest:g} s{why}"
    return Problem("too_long", utterance.where, length)


class BadAudio(ValueError):
    """Audio, or a manifest's line, that cannot be used.

    `kind` says why in a word that can be counted, `reason` in full; the message adds `where`.
    """

    def __init__(self, kind: str, reason: str, where: str = ""):
        super().__init__(f"{where}: {reason}" if where else reason)
        self.kind, self.reason, self.where = kind, reason, where


def handle(
    problems: Iterable[Problem], on_bad_audio: str, skipped_path: str | os.PathLike | None
) -> None:
    """Raises a ValueError that lists the problems, or records them, as `on_bad_audio` asks."""
    record_skipped(may_skip(problems, on_bad_audio), skipped_path)


def may_skip(problems: Iterable[Problem], on_bad_audio: str) -> list[Problem]:
    """The problems, if `on_bad_audio` lets them be skipped; else raises a ValueError of them."""
    if on_bad_audio not in ON_BAD_AUDIO:
        raise ValueError(f"data.on_bad_audio={on_bad_audio!r}: {' or '.join(ON_BAD_AUDIO)}")
    problems = list(problems)
    if on_bad_audio == "raise":
        raise_problems(problems)
    return problems


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
        rundir.append_lines(path, [problem._asdict() for problem in problems])


def in_threads(function: Callable, items: Sequence, label: str) -> list:
    """[function(item) for item in items], in threads, with a progress bar if it takes seconds."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(function, items)
        return list(tqdm.tqdm(results, desc=label, total=len(items), unit="utt", delay=2))
