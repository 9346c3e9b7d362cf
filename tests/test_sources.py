"""Manifests and audio files: what is read, and what is said about every kind of bad input."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict

from otreg_jax.data import sources

RATE = 16000


def tone(seconds, rate=RATE, hz=440.0):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def write_lines(path, lines):
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return path


def data_config(**changes):
    return ConfigDict({"on_bad_audio": "raise", "long_audio": "reject", "data_root": "", **changes})


@pytest.fixture
def good(tmp_path):
    """A folder with one good recording, and the manifest line that names it."""
    soundfile.write(tmp_path / "good.wav", tone(1.0), RATE)
    return {"audio_filepath": "good.wav", "text": " hello ", "duration": 1.0}


def test_reads_what_the_manifest_says(tmp_path, good):
    line = good | {"lang": "en", "speaker": "a", "words": [["hello", 0.1, 0.9]], "extra": 1}
    part = good | {"offset": 0.25, "duration": 0.5, "id": "part"}
    whole, part = sources.read_manifest(write_lines(tmp_path / "m.jsonl", [line, b"", part]))
    assert (whole.text, whole.lang, whole.speaker) == ("hello", "en", "a")
    assert whole.words == (("hello", 0.1, 0.9),)
    assert part.id == "part" and part.where.endswith("m.jsonl:3")
    audio = sources.load_audio(whole)
    assert audio.dtype == np.float32 and audio.shape == (RATE,)
    np.testing.assert_array_equal(sources.load_audio(part), audio[RATE // 4 : 3 * RATE // 4])


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats_rates_and_channels_give_the_same_sound(tmp_path, suffix):
    stereo = np.stack([tone(1.0, 8000), 0.5 * tone(1.0, 8000)], axis=1)
    soundfile.write(tmp_path / f"a.{suffix}", stereo, 8000)
    line = {"audio_filepath": f"a.{suffix}", "text": "a", "duration": 1.0}
    (utterance,) = sources.read_manifest(write_lines(tmp_path / "m.jsonl", [line]))
    audio = sources.load_audio(utterance)
    middle = slice(RATE // 4, RATE // 2)
    correlation = np.corrcoef(audio[middle], tone(1.0)[middle])[0, 1]
    assert len(audio) == RATE and correlation > 0.99
    assert 0.33 < np.abs(audio[middle]).max() < 0.42  # the mean of both channels


def test_missing_durations_are_read_from_the_files(tmp_path, good):
    del good["duration"]
    lines = [good, good | {"offset": 0.75}]
    whole, rest = sources.read_manifest(write_lines(tmp_path / "m.jsonl", lines))
    assert (whole.duration, rest.duration) == (1.0, 0.25)
    assert sources.from_file(str(tmp_path / "good.wav")).duration == 1.0


def test_every_bad_line_is_listed_at_once(tmp_path, good):
    (tmp_path / "empty.wav").write_bytes(b"")
    lines = [
        good,
        b'{"audio_filepath": "good.wav", "text": "caf\xe9"}',
        b'{"audio_filepath": "good.wav", ',
        b'["good.wav"]',
        {"audio_filepath": "good.wav", "duration": 1.0},
        good | {"text": " \t "},
        good | {"audio_filepath": "absent.wav"},
        good | {"audio_filepath": "nowhere/absent.wav"},
        good | {"text": "hello again"},
        good | {"audio_filepath": "../good.wav"},
        good | {"duration": "long"},
        {"audio_filepath": "empty.wav", "text": "no duration, no header"},
        good | {"words": ["hello", 0.0]},
    ]
    path = write_lines(tmp_path / "m.jsonl", lines)
    utterances, problems = sources.scan_manifest(path)
    assert [u.where for u in utterances] == [f"{path}:1"]
    assert [(int(p.where.rpartition(":")[2]), p.kind) for p in problems] == [
        (2, "not_utf8"),
        (3, "invalid_json"),
        (4, "invalid_json"),
        (5, "missing_key"),
        (6, "empty_text"),
        (7, "missing_file"),
        (8, "missing_file"),
        (9, "duplicate_id"),
        (10, "outside_root"),
        (11, "bad_value"),
        (12, "unreadable"),
        (13, "bad_value"),
    ]
    with pytest.raises(ValueError) as error:
        sources.read_manifest(path)
    message = str(error.value)
    assert message.startswith("12 unusable utterances (")
    assert all(f"{path}:{number}: " in message for number in range(2, 14))
    for part in ("'text'", "absent.wav", "already in", "'long'", "on_bad_audio=skip"):
        assert part in message


def test_absent_and_empty_manifests(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.jsonl: no such manifest"):
        sources.read_manifest(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="holds no utterance"):
        sources.read_manifest(write_lines(tmp_path / "empty.jsonl", [b""]))


def test_nothing_leaves_the_data_root(tmp_path, good):
    outside = good | {"audio_filepath": str(tmp_path / "good.wav")}
    path = write_lines(tmp_path / "m.jsonl", [outside])
    assert len(sources.read_manifest(path)) == 1
    (tmp_path / "root").mkdir()
    with pytest.raises(ValueError, match="lies outside of"):
        sources.read_manifest(path, data_root=str(tmp_path / "root"))


def test_noise_needs_no_transcript(tmp_path, good):
    del good["text"]
    path = write_lines(tmp_path / "noise.jsonl", [good])
    assert sources.read_manifest(path, require_text=False)[0].text == ""


def bad_audio(folder):
    """Files that only reading shows to be bad: name -> kind."""
    soundfile.write(folder / "whole.flac", np.random.default_rng(0).uniform(-1, 1, RATE), RATE)
    flac = (folder / "whole.flac").read_bytes()
    (folder / "truncated.flac").write_bytes(flac[: len(flac) // 2])
    soundfile.write(folder / "none.wav", np.zeros(0), RATE)
    (folder / "text.wav").write_text("this is no audio")
    samples = tone(1.0)
    samples[100] = np.nan
    soundfile.write(folder / "nan.wav", samples, RATE, subtype="FLOAT")
    soundfile.write(folder / "rate.wav", tone(1.0), RATE // 2)  # 16 kHz samples under a header of 8
    soundfile.write(folder / "short.wav", tone(0.5), RATE)
    return {
        "truncated.flac": "unreadable",
        "none.wav": "zero_length",
        "text.wav": "unreadable",
        "nan.wav": "nan_samples",
        "rate.wav": "duration_mismatch",
        "short.wav": "duration_mismatch",
    }


def test_bad_audio_is_named(tmp_path):
    kinds = bad_audio(tmp_path)
    lines = [{"audio_filepath": name, "text": "a", "duration": 1.0} for name in kinds]
    path = write_lines(tmp_path / "m.jsonl", lines)
    for number, utterance in enumerate(sources.read_manifest(path), start=1):
        name = utterance.audio.rpartition("/")[2]
        with pytest.raises(sources.BadAudio, match=f"m.jsonl:{number}: .*{name}") as error:
            sources.load_audio(utterance)
        assert error.value.kind == kinds[name], name


def test_skipping_counts_and_records(tmp_path, good, capsys):
    lines = [good, b"{", good | {"audio_filepath": "x.wav"}, good | {"audio_filepath": "y.wav"}]
    path, skipped = write_lines(tmp_path / "m.jsonl", lines), tmp_path / "run" / "skipped.jsonl"
    config = data_config(on_bad_audio="skip")
    kept = sources.load_utterances(str(path), config, max_duration=30, skipped_path=str(skipped))
    assert len(kept) == 1
    records = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert Counter(r["kind"] for r in records) == {"missing_file": 2, "invalid_json": 1}
    assert records[0]["where"] == f"{path}:2"
    assert "3 unusable utterances (missing_file 2, invalid_json 1)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="m.jsonl:2: invalid JSON"):
        sources.load_utterances(str(path), data_config(), max_duration=30)
    with pytest.raises(ValueError, match="on_bad_audio='ignore'"):
        config = data_config(on_bad_audio="ignore")
        sources.load_utterances(str(path), config, max_duration=30)


def test_long_audio_is_refused_or_divided_but_never_cut(tmp_path, capsys):
    words = [["one", 0.1, 0.8], ["two", 1.0, 1.9], ["three", 2.1, 2.7], ["four", 2.9, 3.8]]
    soundfile.write(tmp_path / "long.wav", tone(4.0), RATE)
    soundfile.write(tmp_path / "plain.wav", tone(4.0), RATE)
    plain = {"audio_filepath": "plain.wav", "text": "no times", "duration": 4.0}
    timed = {**plain, "audio_filepath": "long.wav", "text": "one two three four", "words": words}
    path = str(write_lines(tmp_path / "m.jsonl", [timed, plain]))
    skipped = tmp_path / "skipped.jsonl"

    with_chunks = data_config(long_audio="chunk")
    assert sources.load_utterances(path, data_config(), max_duration=2.5) == []
    assert "refused 2 unusable utterances (too_long 2)" in capsys.readouterr().out
    parts = sources.load_utterances(path, with_chunks, max_duration=2.5, skipped_path=skipped)
    assert [p.text for p in parts] == ["one two", "three four"]
    assert [p.offset for p in parts] == [0.0, 2.0]
    assert sum(p.duration for p in parts) == 4.0  # nothing between the parts is lost
    assert [len(sources.load_audio(p)) for p in parts] == [2 * RATE, 2 * RATE]
    assert parts[1].words[0] == ("three", pytest.approx(0.1), pytest.approx(0.7))
    assert json.loads(skipped.read_text())["kind"] == "too_long"
    again = sources.read_manifest(tmp_path / "segments.jsonl")
    assert [(u.text, u.offset) for u in again] == [(p.text, p.offset) for p in parts]
    # A word longer than the limit is refused, the words around it are not.
    capsys.readouterr()
    kept = sources.load_utterances(path, with_chunks, max_duration=0.96)
    assert {p.text for p in kept} == {"one", "three"}
    assert "too_long 3" in capsys.readouterr().out
