"""Manifests and audio files: what is read, and what is said about every kind of bad input."""

import json
import time
from collections import Counter

import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict

from otreg_jax.data import audio, remote, sources

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
    samples = sources.load_audio(whole)
    assert samples.dtype == np.float32 and samples.shape == (RATE,)
    np.testing.assert_array_equal(sources.load_audio(part), samples[RATE // 4 : 3 * RATE // 4])


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats_rates_and_channels_give_the_same_sound(tmp_path, suffix):
    stereo = np.stack([tone(1.0, 8000), 0.5 * tone(1.0, 8000)], axis=1)
    soundfile.write(tmp_path / f"a.{suffix}", stereo, 8000)
    line = {"audio_filepath": f"a.{suffix}", "text": "a", "duration": 1.0}
    (utterance,) = sources.read_manifest(write_lines(tmp_path / "m.jsonl", [line]))
    samples = sources.load_audio(utterance)
    middle = slice(RATE // 4, RATE // 2)
    correlation = np.corrcoef(samples[middle], tone(1.0)[middle])[0, 1]
    assert len(samples) == RATE and correlation > 0.99
    assert 0.33 < np.abs(samples[middle]).max() < 0.42  # the mean of both channels


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


# ---- what users' manifests hold ------------------------------------------------------------------

MANY = 10**401  # more digits than a float has room for
LINES = [  # changes to a good line of 1 s, and the message; or what comes of it
    ({"audio_filepath": "http://host/a.wav"}, "http://host/a.wav: http:// is not read"),
    ({"audio_filepath": "https://host/a.wav"}, "https:// is not read: fetch the files"),
    ({"audio_filepath": "s3://bucket/a.wav"}, "s3:// is not read"),
    ({"audio_filepath": "file://good.wav"}, "starts with three slashes"),
    ({"audio_filepath": "a\0/good.wav"}, "audio_filepath is 'a\\x00/good.wav', not a path"),
    ({"audio_filepath": " "}, "not a path"),
    ({"audio_filepath": "x" * 5000 + "/good.wav"}, "does not exist"),
    ({"audio_filepath": "record:there:train:0"}, None),  # found out when it is read
    ({"duration": MANY}, "a number of 402 digits"),
    ({"anything": MANY}, "a number of 402 digits"),
    ({"duration": 10**90}, "duration is 1000000"),
    ({"duration": True}, "duration is True, not a number of seconds"),
    ({"offset": False}, "offset is False, not a number of seconds"),
    ({"offset": 1e308}, "offset is 1e+308, not a number of seconds"),
    ({"offset": float("nan")}, "offset is nan"),
    ({"duration": float("inf")}, "duration is inf"),
    ({"duration": -1}, "duration is -1"),
    ({"duration": 0}, "duration is 0"),
    ({"duration": "1.0"}, "duration is '1.0', not a number of seconds"),
    ({"text": "a \ud800 b"}, "text holds half a character ('\\ud800') at 2"),
    ({"lang": "\udfff"}, "lang holds half a character"),
    ({"speaker": "\ud800"}, "speaker holds half a character"),
    ({"id": "\ud800"}, "id holds half a character"),
    ({"audio_filepath": "\ud800.wav"}, "audio_filepath holds half a character"),
    ({"text": None}, "no string under 'text'"),
    ({"lang": ["de"]}, "lang is ['de'], not a string"),
    ({"language": 3}, "language is 3, not a string"),
    ({"speaker": {"name": "a"}}, "speaker is {'name': 'a'}, not a string"),
    ({"id": 1.5}, "id is 1.5, not a string"),
    ({"id": True}, "id is True, not a string"),
    ({"words": {"a": 0}}, "words is not [[word, start, end], ...] in seconds"),
    ({"words": [["a", 0.0]]}, "in seconds: ['a', 0.0]"),
    ({"words": [["a", 0.0, True]]}, "in seconds: ['a', 0.0, True]"),
    ({"words": [["a", 0.0, float("nan")]]}, "in seconds: ['a', 0.0, nan]"),
    ({"words": [["a", 0.0, MANY]]}, "a number of 402 digits"),
    ({"words": [["\ud800", 0.0, 0.5]]}, "words holds half a character"),
    ({"words": [["a", -0.5, 0.5]]}, "'a' lies at -0.5 to 0.5 s"),
    ({"words": [["a", 0.5, 0.2]]}, "'a' lies at 0.5 to 0.2 s"),
    ({"words": [["a", 0.5, 0.7], ["b", 0.1, 0.3]]}, "before the word that it follows"),
    ({"words": [["a", 0.5, 1.7]]}, "0.5 to 1.7 s, the audio is 1.00 s long"),
    ({"words": [["a", 0.5, 1.7]], "duration": None}, "the audio is 1.00 s long"),
    ({"words": [["a", 0.5, 1.05]]}, None),  # within what durations are rounded to
]


@pytest.mark.parametrize("changes, message", LINES)
def test_every_line_is_used_or_named(tmp_path, good, changes, message):
    path = write_lines(tmp_path / "m.jsonl", [good, good | {"id": "2"} | changes])
    utterances, problems = sources.scan_manifest(path)
    if message is None:
        assert len(utterances) == 2 and not problems
    else:
        assert [u.where for u in utterances] == [f"{path}:1"]
        (problem,) = problems
        assert problem.where == f"{path}:2" and message in problem.message


def test_lines_that_are_no_objects_are_named(tmp_path, good):
    whole = json.dumps(good).encode()
    twice = whole[:-1] + b', "text": "other"}'
    lines = [b"\xef\xbb\xbf" + whole, b"[" * 100_000, twice, b'"text"', b"null", whole + whole]
    utterances, problems = sources.scan_manifest(write_lines(tmp_path / "m.jsonl", lines))
    assert len(utterances) == 1  # after a byte order mark
    assert {p.kind for p in problems} == {"invalid_json"} and len(problems) == 5
    assert "more than once: 'text'" in problems[1].message


def test_columns_of_other_tools_are_used_or_named_once(tmp_path, good, capsys):
    columns = [
        {"lang": " de\n", "language": "en"},
        {"language": "de"},
        {"locale": "de"},
        {"lang_id": "de"},
        {"source_lang": "en", "target_lang": "de"},
        {"lang": None, "source_lang": "de", "context": "x", "pnc": "yes", "id": 0},
        {"lang": "de", "context": "y", "speaker": 17},
    ]
    lines = [{"id": f"{i}"} | good | found for i, found in enumerate(columns, start=1)]
    path = write_lines(tmp_path / "m.jsonl", lines)
    utterances = sources.read_manifest(path)
    assert [u.lang for u in utterances] == ["de"] * 7
    assert utterances[5].id == "0" and utterances[6].speaker == "17"
    unused = "'context', 'language', 'pnc', 'source_lang'"  # where another column says otherwise
    assert capsys.readouterr().out == f"{path}: columns that are not used: {unused}\n"


def test_file_urls_are_paths(tmp_path, good):
    (tmp_path / "a b").mkdir()
    (tmp_path / "good.wav").rename(tmp_path / "a b" / "c.wav")
    good["audio_filepath"] = f"file://{tmp_path}/a%20b/c.wav"
    path = write_lines(tmp_path / "m.jsonl", [good])
    (utterance,) = sources.read_manifest(f"FILE://{path}")
    assert len(sources.load_audio(utterance)) == RATE


def test_a_bucket_that_does_not_answer_is_named_once(tmp_path, good, monkeypatch):
    asked = []

    class Bucket:
        def __init__(self, path):
            self.path = path

        def exists(self):
            asked.append(self.path)
            time.sleep(60)

    monkeypatch.setattr(remote.epath, "Path", Bucket)
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    lines = [good | {"audio_filepath": f"gs://bucket/{i}.wav"} for i in range(50)]
    path = write_lines(tmp_path / "m.jsonl", lines)
    monkeypatch.setattr(remote.epath, "Path", lambda p: path if str(p) == str(path) else Bucket(p))
    start = time.monotonic()
    with pytest.raises(
        OSError, match="gs://bucket cannot be read .no answer .*50 utterances, from"
    ):
        sources.read_manifest(path)
    assert asked == ["gs://bucket/0.wav"] and time.monotonic() - start < 5
    with pytest.raises(ValueError, match="https:// is not read"):
        sources.read_manifest("https://host/m.jsonl")


# ---- audio that is not what it seems -------------------------------------------------------------


def test_empty_and_cut_off_files_are_named(tmp_path):
    (tmp_path / "empty.mp3").write_bytes(b"")
    soundfile.write(tmp_path / "whole.wav", tone(2.0), RATE)
    soundfile.write(tmp_path / "whole.opus", tone(9.0), RATE, format="OGG", subtype="OPUS")
    for suffix in ("wav", "opus"):
        data = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "samples.raw").write_bytes(b"1234")
    names = ["empty.mp3", "cut.wav", "cut.opus", "folder.wav", "samples.raw", "whole.wav"]
    lines = [{"audio_filepath": name, "text": "a"} for name in names]
    utterances, problems = sources.scan_manifest(write_lines(tmp_path / "m.jsonl", lines))
    assert [u.id for u in utterances] == ["whole.wav"]
    for problem, said in zip(
        problems,
        (
            "empty.mp3 is empty",
            "cut.wav is truncated: the header says 64036 bytes, there are 32014",
            "cut.opus is truncated: its last page is missing",
            "folder.wav cannot be read as audio: it is not a file",
            "samples.raw cannot be read as audio",
        ),
        strict=True,
    ):
        assert problem.kind == "unreadable" and said in problem.message
    for name in names[:2]:
        line = {"audio_filepath": name, "text": "a", "duration": 2.0}
        (utterance,) = sources.read_manifest(write_lines(tmp_path / "m.jsonl", [line]))
        with pytest.raises(sources.BadAudio, match="is empty|holds 1.00 s of audio"):
            sources.load_audio(utterance)


def test_headers_that_promise_what_cannot_be_are_named(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.1), RATE)
    header = bytearray((tmp_path / "a.wav").read_bytes())
    header[24:28] = (1).to_bytes(4, "little")  # a rate of 1 Hz: 1600 s
    (tmp_path / "slow.wav").write_bytes(header)
    soundfile.write(tmp_path / "a.flac", tone(0.1), RATE)
    header = bytearray((tmp_path / "a.flac").read_bytes())
    for name, samples in (("long", b"\x0f\xff\xff\xff\xff"), ("pipe", b"\0\0\0\0\0")):
        header[21:26] = bytes([header[21] & 0xF0 | samples[0]]) + samples[1:]
        (tmp_path / f"{name}.flac").write_bytes(header)
    with pytest.raises(sources.BadAudio, match="broken header: it says 1600 samples at 1 Hz"):
        sources.from_file(str(tmp_path / "slow.wav"))
    with pytest.raises(sources.BadAudio, match="broken header: it says 68719476735 samples"):
        sources.from_file(str(tmp_path / "long.flac"))
    with pytest.raises(sources.BadAudio, match="does not say in its header how long it is"):
        sources.from_file(str(tmp_path / "pipe.flac"))
    with pytest.raises(sources.BadAudio, match="http:// is not read"):
        sources.from_file("http://host/a.wav")


def odd_audio(folder):
    """Files that can be used, but are odd: name -> kind."""
    loud = 5 * tone(1.0)
    files = {
        "anti_phase": np.stack([tone(1.0), -tone(1.0)], axis=1),
        "silent": np.zeros(RATE),
        "mostly_silent": np.concatenate([tone(0.05), np.zeros(RATE - RATE // 20)]),
        "clipped": np.clip(loud, -1, 1),
        "over_full_scale": loud,
        "good": tone(1.0),
    }
    for kind, samples in files.items():
        soundfile.write(folder / f"{kind}.wav", samples, RATE, subtype="FLOAT")
    data = (folder / "good.wav").read_bytes()
    (folder / "cut_off.wav").write_bytes(data[: len(data) // 2])
    return {f"{kind}.wav": kind for kind in [*files, "cut_off"]}


def test_what_is_odd_is_told_from_what_is_bad(tmp_path):
    kinds = odd_audio(tmp_path)
    lines = [
        {"audio_filepath": name, "text": "a", "duration": 0.5 if name == "cut_off.wav" else 1.0}
        for name in kinds
    ]
    utterances = sources.read_manifest(write_lines(tmp_path / "m.jsonl", lines))
    heard = [(u.id, audio.listen(u).odd) for u in utterances]
    assert dict(heard) == {name: () if k == "good" else (k,) for name, k in kinds.items()}
    assert set(kinds.values()) - {"good"} == set(audio.ODDITIES)
    report = audio.report(heard, len(heard))
    assert report[0] == "data report: 6 of 7 utterances can be used, but are odd:"
    assert "  silent 1: no sample above -80 dB (silent.wav)" in report and len(report) == 7
    assert audio.report([("good.wav", ())], 1) == []
    scaled = sources.load_audio(utterances[4])
    np.testing.assert_allclose(scaled, 2 * tone(1.0) / (2 * tone(1.0)).max(), atol=1e-6)


def test_parts_of_divided_audio_keep_the_spelling_of_the_transcript(tmp_path):
    soundfile.write(tmp_path / "long.wav", tone(4.0), RATE)
    times = [[0.1, 0.8], [1.0, 1.9], [2.1, 2.7], [2.9, 3.8]]
    line = {"audio_filepath": "long.wav", "duration": 4.0}
    timed = lambda words: [[word, *time] for word, time in zip(words, times, strict=True)]
    english, japanese = timed("one two three four".split()), timed(["今日", "は", "いい", "天気。"])
    lines = [
        line | {"id": "a", "text": "One, two. Three: four!", "words": english},
        line | {"id": "b", "text": "今日は いい天気。", "words": japanese},
        line | {"id": "c", "text": "one two three", "words": timed(["one", "two", "x", "y"])},
    ]
    path = str(write_lines(tmp_path / "m.jsonl", lines))
    skipped = tmp_path / "skipped.jsonl"
    config = data_config(long_audio="chunk")
    parts = sources.load_utterances(path, config, max_duration=2.5, skipped_path=skipped)
    assert [p.text for p in parts] == ["One, two.", "Three: four!", "今日は", "いい天気。"]
    refused = json.loads(skipped.read_text())
    assert refused["where"] == f"{path}:3" and "not those of its text" in refused["message"]
