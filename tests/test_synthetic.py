"""Synthetic speech: the same on every run, cached whole or not at all, in the asked conditions."""

import importlib.util
import itertools
import json

import numpy as np
import pytest
import soundfile

from otreg_jax.data import sources, synthetic
from otreg_jax.data.synthetic import Speech

TEXT = "turn on the kitchen light"


def read(manifest):
    return [
        (json.loads(line), soundfile.read(manifest.parent / json.loads(line)["audio_filepath"])[0])
        for line in manifest.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """One set that holds a sentence in every condition."""
    items = [
        Speech(TEXT),
        Speech(TEXT, voice="en-gb+f3"),
        Speech(TEXT, rate=300),
        Speech(TEXT, reverb=0.5),
        Speech(TEXT, snr=10.0),
        Speech(TEXT, silence=(0.5, 0.25)),
        Speech("schalte das Licht ein", voice="de", lang="de", speaker="anna"),
        Speech("it is no longer on the shelf"),
    ]
    cache = tmp_path_factory.mktemp("cache")
    return items, cache, synthetic.synthesize({"all": items}, cache)["all"]


def test_manifest_is_one_the_sources_read(spoken):
    assert synthetic.SAMPLE_RATE == sources.SAMPLE_RATE
    items, _, manifest = spoken
    utterances = sources.read_manifest(manifest)
    assert [u.text for u in utterances] == [item.text for item in items]
    assert (utterances[6].lang, utterances[6].speaker) == ("de", "anna")
    for utterance in utterances:
        assert len(sources.load_audio(utterance)) == round(utterance.duration * 16000)
        words = utterance.words
        assert " ".join(word for word, _, _ in words) == utterance.text
        assert all(word in f" {utterance.text} " for word in (f" {w} " for w, _, _ in words))
        assert len(words) >= 4 and words[-1][2] <= utterance.duration + 1e-3
        assert all(0 <= start < end for _, start, end in words)
        assert all(before[2] <= after[1] for before, after in itertools.pairwise(words))


def test_conditions_are_heard(spoken):
    plain, voice, fast, reverb, noise, silence, *_ = [audio for _, audio in read(spoken[2])]
    assert 1.0 < len(plain) / 16000 < 3.0
    assert len(voice) != len(plain)
    assert len(fast) < 0.75 * len(plain)
    assert len(reverb) > len(plain) + 0.2 * 16000
    assert abs(len(noise) - len(plain)) < 400
    assert np.abs(plain[:160]).max() > 1e-4  # trimmed: speech from the start
    assert np.abs(silence[: 16000 // 2]).max() == 0 == np.abs(silence[-16000 // 4 :]).max()
    assert abs(len(silence) - len(plain) - 0.75 * 16000) < 400
    quiet = np.sort(np.abs(noise))[: len(noise) // 4]
    assert quiet.mean() > 3 * np.sort(np.abs(plain))[: len(plain) // 4].mean()


def test_same_audio_in_another_process_and_at_once_from_the_cache(spoken, tmp_path, monkeypatch):
    items, cache, manifest = spoken
    again = synthetic.synthesize({"other name": items}, tmp_path)["other name"]
    for (line, audio), (line_again, audio_again) in zip(read(manifest), read(again), strict=True):
        assert line == line_again
        np.testing.assert_array_equal(audio, audio_again)
    monkeypatch.setattr(synthetic, "_speak", lambda *_: pytest.fail("spoke a cached set"))
    assert synthetic.synthesize({"all": items}, cache)["all"] == manifest
    other = synthetic._content_key([items[0]._replace(pitch=51), *items[1:]])
    assert other != synthetic._content_key(items)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Speech(TEXT, voice="xx-none"), "no voice 'xx-none'"),
        (Speech(TEXT, voice="en-us+none"), "no voice variant 'none'"),
        (Speech(" ... "), "said nothing"),
    ],
)
def test_failed_synthesis_names_the_reason_and_leaves_nothing(item, message, tmp_path):
    with pytest.raises(ValueError, match=f"set 'bad'.*{message}"):
        synthetic.synthesize({"bad": [item]}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_espeak_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install espeakng-loader"):
        synthetic.synthesize({"a": [Speech(TEXT)]}, tmp_path)
