"""Subtitles: cues of readable length, and their files."""

import itertools

import numpy as np
import pytest

from otreg_jax import subtitles
from otreg_jax.subtitles import Cue


def spoken(text, start=0.0, each=0.3):
    """Words of `each` seconds, one after the other."""
    return [(word, start + i * each, start + (i + 1) * each) for i, word in enumerate(text.split())]


def test_a_long_piece_becomes_cues_that_can_be_read():
    words = spoken("the quick brown fox jumps over the lazy dog again and again " * 4, each=0.29)
    found = subtitles.cues(words)
    assert " ".join(cue.text for cue in found) == " ".join(word for word, _, _ in words)
    assert found[0].start == 0 and found[-1].end == words[-1][2]
    for cue in found:
        assert cue.end - cue.start <= subtitles.LONGEST and len(cue.text) <= 2 * subtitles.LINE
    for one, two in itertools.pairwise(found):
        assert one.end == two.start
        # No cue had room for one word more.
        more = f"{one.text} {two.text.split()[0]}"
        assert len(more) > 2 * subtitles.LINE or two.start + 0.29 - one.start > subtitles.LONGEST


def test_cues_end_with_sentences_and_before_pauses():
    words = spoken("Yes. I turned the kitchen light on.") + spoken("And off", 2.2)
    words += spoken("again", words[-1][2] + subtitles.PAUSE)
    assert [cue.text for cue in subtitles.cues(words)] == [
        "Yes. I turned the kitchen light on.",
        "And off",
        "again",
    ]
    assert subtitles.cues([]) == []


def test_text_without_spaces_is_divided():
    word = "".join(chr(0x3042 + i % 80) for i in range(200))
    found = subtitles.cues([(word, 1.0, 11.0)])
    assert "".join(cue.text for cue in found) == word
    assert max(len(cue.text) for cue in found) <= 2 * subtitles.LINE
    np.testing.assert_allclose([cue.start for cue in found], [1.0, 4.35, 7.7])
    assert found[-1].end == 11.0


@pytest.mark.parametrize("kind, mark", [("srt", ","), ("vtt", ".")])
def test_files(kind, mark):
    long = "a line of forty-two characters stands here and a second one under it"
    found = [Cue(0.0, 1.5, "hello"), Cue(3599.9996, 3661.25, long)]
    head = "WEBVTT\n\n" if kind == "vtt" else ""
    assert subtitles.as_text(found, kind) == head + (
        f"1\n00:00:00{mark}000 --> 00:00:01{mark}500\nhello\n\n"
        f"2\n01:00:00{mark}000 --> 01:01:01{mark}250\n"
        "a line of forty-two characters\nstands here and a second one under it\n"
    )
