"""Words with their times to subtitles that can be read: SubRip and WebVTT."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

LINE = 42  # characters, as broadcasters have it; a cue has at most two such lines
LONGEST = 7.0  # seconds a cue stays
PAUSE = 0.8  # seconds without a word that end a cue
ENDS = (".", "?", "!", "…", "。", "？", "！", "।")


class Cue(NamedTuple):
    """A text and when it is shown, in seconds."""

    start: float
    end: float
    text: str


def cues(words: Iterable[tuple[str, float, float]]) -> list[Cue]:
    """Words (text, start, end), in order, in cues of at most 2 LINE characters and LONGEST seconds.

    A cue also ends before a pause, and behind a sentence if it holds half a line by then.
    """
    found: list[Cue] = []
    is_full = True
    for word, start, end in itertools.chain.from_iterable(itertools.starmap(_parts, words)):
        if found and not is_full:
            last = found[-1]
            longer = Cue(last.start, end, f"{last.text} {word}")
            fits = len(longer.text) <= 2 * LINE and end - last.start <= LONGEST
            if fits and start - last.end < PAUSE:
                found[-1] = longer
            else:
                found.append(Cue(start, end, word))
        else:
            found.append(Cue(start, end, word))
        is_full = word.endswith(ENDS) and len(found[-1].text) >= LINE // 2
    return found


def _parts(word: str, start: float, end: float) -> Iterator[tuple[str, float, float]]:
    """A word, or parts of at most two lines of it, where a text has no spaces."""
    count = -(-len(word) // (2 * LINE))
    size = -(-len(word) // count)
    for first in range(0, len(word), size):
        last = min(first + size, len(word))
        at = lambda i: start + (end - start) * i / len(word)
        yield word[first:last], at(first), at(last)


def as_text(found: Sequence[Cue], kind: str) -> str:
    """The contents of a SubRip ("srt") or WebVTT ("vtt") file."""
    mark = "," if kind == "srt" else "."

    def stamp(seconds: float) -> str:
        milliseconds = round(1000 * seconds)
        minutes, milliseconds = divmod(milliseconds, 60_000)
        whole = f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}"
        return f"{whole}{mark}{milliseconds % 1000:03}"

    blocks = [
        f"{i}\n{stamp(cue.start)} --> {stamp(cue.end)}\n{_two_lines(cue.text)}\n"
        for i, cue in enumerate(found, 1)
    ]
    return ("WEBVTT\n\n" if kind == "vtt" else "") + "\n".join(blocks)


def _two_lines(text: str) -> str:
    """The text on one line or, if it is long, on two of about the same length."""
    spaces = [i for i, letter in enumerate(text) if letter == " "]
    if len(text) <= LINE or not spaces:
        return text
    middle = min(spaces, key=lambda i: abs(2 * i + 1 - len(text)))
    return f"{text[:middle]}\n{text[middle + 1 :]}"
