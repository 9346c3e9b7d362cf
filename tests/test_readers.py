"""Data sets of other tools: order and content are those of the tools' own readers."""

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from otreg_jax.data import embedded, readers, sources
from otreg_jax.data.utterances import BadAudio

COLUMNS = frozenset({"text", "target_text", "context"})
TEXTS = ("eins zwei", "drei", "vier fünf", "sechs")


def tone(i: int) -> np.ndarray:
    samples = np.sin(np.arange(1600 * (i + 1)) * (0.05 + 0.02 * i)).astype(np.float32) / 4
    return np.round(samples * 2**15) / np.float32(2**15)  # what 16 bits hold


def as_bytes(i: int, kind="WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(i), 16000, format=kind, subtype="PCM_16")
    return file.getvalue()


def check(path, texts=TEXTS, order=range(4), **columns):
    """Reads a set, and holds it to these texts and tones; returns its utterances."""
    found, problems = sources.scan(str(path), columns=COLUMNS)
    assert not problems and [u.text for u in found] == list(texts)
    for utterance, i in zip(found, order, strict=True):
        np.testing.assert_allclose(sources.load_audio(utterance), tone(i), atol=1e-6)
        assert utterance.where.startswith(f"{path}")
    return found


@pytest.fixture
def kaldi(tmp_path):
    folder = tmp_path / "kaldi"
    folder.mkdir()
    for i in range(4):
        soundfile.write(folder / f"{i}.wav", tone(i), 16000, subtype="PCM_16")
    write = lambda name, lines: (folder / name).write_text("\n".join(lines) + "\n")
    write("wav.scp", [f"u{i} {folder}/{i}.wav" for i in range(4)])
    write("text", [f"u{i}  {TEXTS[i]}" for i in range(4)])
    write("utt2lang", [f"u{i}\tde" for i in range(4)])
    return folder


def test_a_kaldi_directory_is_read_as_kaldiio_reads_it(kaldi):
    import kaldiio

    found = check(kaldi)
    theirs = kaldiio.load_scp(str(kaldi / "wav.scp"))
    assert [u.id for u in found] == list(theirs) and {u.lang for u in found} == {"de"}
    for utterance in found:
        rate, samples = theirs[utterance.id]
        np.testing.assert_allclose(sources.load_audio(utterance), samples / 2**15, atol=1e-6)
        assert rate == 16000


def test_segments_divide_recordings_and_what_is_wrong_is_named(kaldi):
    (kaldi / "segments").write_text("u1 u3 0.1 0.3\nu0 u2 0.0 0.05\nu9 gone 0 1\nu8 u1 0 x\n")
    with open(kaldi / "wav.scp", "a") as file:
        file.write("u5 sox in.wav -t wav - |\n")
    found, problems = sources.scan(str(kaldi), columns=COLUMNS)
    assert [(u.id, u.offset, round(u.duration, 3)) for u in found] == [
        ("u1", 0.1, 0.2),
        ("u0", 0.0, 0.05),
    ]
    np.testing.assert_allclose(sources.load_audio(found[0]), tone(3)[1600:4800], atol=1e-6)
    told = {p.where: p.message for p in problems}
    assert "'gone' stands not in wav.scp" in told[f"{kaldi}/segments:3"]
    assert "segments has 'x', not a number" in told[f"{kaldi}/segments:4"]
    assert "'u2' stands not in segments" in told[f"{kaldi}/text:3"]
    (kaldi / "segments").unlink()
    (kaldi / "text").write_text("u0 a\nu1 b\nu2 c\nu3 d\nu1 e\n")
    (kaldi / "utt2dur").write_text("u0 0.1\nu1 x\n")
    told = {p.where: p.message for p in sources.scan(str(kaldi))[1]}
    assert "a pipe is not run" in told[f"{kaldi}/wav.scp:5"]
    assert "'u1' stands twice in text" in told[f"{kaldi}/text:5"]
    assert "utt2dur has 'x', not a number" in told[f"{kaldi}/wav.scp:2"]
    (kaldi / "text").write_bytes(b"u0 a\nu1 \xff\n")
    with pytest.raises(ValueError, match="text:2: byte 8 is not UTF-8"):
        sources.scan(str(kaldi))


def test_a_saved_data_set_is_read_as_datasets_reads_it(tmp_path):
    import datasets

    rows = [
        {"audio": {"bytes": as_bytes(i), "path": f"{i}.wav"}, "sentence": TEXTS[i], "locale": "de"}
        for i in range(4)
    ]
    rows = [row | {"context": [row["sentence"][:3]], "up_votes": 2} for row in rows]
    saved = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
    both = datasets.DatasetDict({"train": saved, "test": saved.select([2, 0])})
    both.save_to_disk(tmp_path / "hf")
    check(tmp_path / "hf")
    found = check(f"{tmp_path}/hf:test", [TEXTS[2], TEXTS[0]], [2, 0])
    assert dict(found[0].fields)["context"] == ("vie",) and found[0].lang == "de"
    theirs = datasets.load_from_disk(str(tmp_path / "hf"))["test"]
    assert [row["sentence"] for row in theirs] == [u.text for u in found]
    assert [embedded.read(u.audio) for u in found] == [row["audio"]["bytes"] for row in theirs]
    assert found[1].where == f"{tmp_path}/hf:test:2"
    with pytest.raises(FileNotFoundError, match="hf: no split 'dev', there are test, train"):
        sources.scan(f"{tmp_path}/hf:dev")
    (table,) = (tmp_path / "hf" / "train").glob("*.arrow")
    table.write_bytes(table.read_bytes()[:2000])
    embedded.arrow.cache_clear()
    with pytest.raises(ValueError, match=f"{table}: not a table of Arrow's .*or damaged"):
        sources.scan(f"{tmp_path}/hf:train")


def test_parquet_files_are_read_in_the_order_of_names(tmp_path, capsys):
    table = {
        "audio": [{"bytes": as_bytes(i, "FLAC"), "path": None} for i in range(4)],
        "transcription": list(TEXTS),
        "gender": [1, 0, 1, 0],
    }
    table = pyarrow.table(table)
    (tmp_path / "data").mkdir()
    part = lambda n: tmp_path / "data" / f"train-0000{n}-of-00002.parquet"
    pyarrow.parquet.write_table(table[:3], part(0), row_group_size=2)
    pyarrow.parquet.write_table(table[3:], part(1))
    cells = 8 * [u.audio for u in check(f"{tmp_path}:train")[:3]]
    assert "columns that are not used: 'gender'" in capsys.readouterr().out
    in_threads = lambda: sources.in_threads(embedded.read, cells, "")
    for _ in range(20):  # pyarrow's reader is not for many threads at once
        embedded._row_group.cache_clear()
        assert in_threads() == [as_bytes(i, "FLAC") for _ in range(8) for i in range(3)]
    assert readers.find(f"{tmp_path}:test") is None
    with pytest.raises(ValueError, match="no column holds audio; there are gender"):
        pyarrow.parquet.write_table(table.select(["gender"]), part(0))
        sources.scan(f"{tmp_path}:train")
    with pytest.raises(BadAudio, match="not so many rows"):
        embedded.read(embedded.cell_address(str(part(1)), 9, "audio"))


def test_columns_of_parquet_files_mean_what_datasets_means(tmp_path, capsys):
    import datasets

    features = {
        "raw_transcription": datasets.Value("large_string"),
        "transcription": datasets.Value("string"),
        "lang_id": datasets.ClassLabel(names=["af_za", "de_de"]),
        "id": datasets.Value("int32"),
        "seen": datasets.Value("timestamp[ms]"),
        "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    }
    rows = [
        {"raw_transcription": "Eins!", "transcription": TEXTS[i], "lang_id": 1, "id": 7, "seen": 0}
        | {"audio": {"bytes": as_bytes(i), "path": f"{i}.wav"}}
        for i in range(4)
    ]
    written = datasets.Dataset.from_list(rows, datasets.Features(features))
    path = tmp_path / "a.parquet"
    written.to_parquet(path)
    found = check(path)
    theirs = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert [row["transcription"] for row in theirs] == [u.text for u in found]
    assert [row["audio"]["bytes"] for row in theirs] == [embedded.read(u.audio) for u in found]
    assert {u.lang for u in found} == {theirs.features["lang_id"].int2str(1)} == {"de_de"}
    assert "columns that are not used: 'raw_transcription', 'seen'" in capsys.readouterr().out
    _, problems = sources.scan(str(path), columns=frozenset({"seen"}))
    assert "seen is {'type': 'timestamp[ms]'}, not a text" in problems[0].message
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{path}: not a Parquet file, or damaged"):
        sources.scan(str(path))


def test_what_is_wrong_with_a_parquet_file_is_named_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    audio = [{"bytes": data, "path": None} for data in (as_bytes(0), b"no audio", None)]
    pyarrow.parquet.write_table(pyarrow.table({"audio": audio, "text": ["a", "b", "c"]}), path)
    found, problems = sources.scan(str(path))
    told = {p.where: p.message for p in problems}
    assert [u.text for u in found] == ["a"]
    assert "cannot be read as audio" in told[f"{path}:2"] and "no bytes" in told[f"{path}:3"]
    table = pyarrow.table({"audio": ["gone.wav"], "text": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    (problem,) = sources.scan(f"{tmp_path}/b.parquet")[1]
    assert problem.message == f"audio file {tmp_path}/gone.wav does not exist"


def write_tar(path, rows) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in rows:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_tars_are_read_as_webdataset_reads_them(tmp_path):
    import webdataset

    for n in range(2):
        rows = []
        for i in (2 * n, 2 * n + 1):
            told = {"text": TEXTS[i], "lang": "de", "target_text": f"t{i}"}
            rows += [(f"a/{i}.wav", as_bytes(i)), (f"a/{i}.json", json.dumps(told).encode())]
        write_tar(tmp_path / f"set-{n}.tar", rows)
    found = check(f"{tmp_path}/set-{{0..1}}.tar")
    assert [u.audio for u in check(tmp_path)] == [u.audio for u in found]
    urls = [str(tmp_path / f"set-{n}.tar") for n in range(2)]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [u.id for u in found] == [sample["__key__"] for sample in theirs]
    assert [embedded.read(u.audio) for u in found] == [sample["wav"] for sample in theirs]
    given = [json.loads(sample["json"])["target_text"] for sample in theirs]
    assert [dict(u.fields)["target_text"] for u in found] == given


def test_what_is_wrong_with_a_tar_is_named_with_file_and_row(tmp_path):
    rows = [("0.wav", as_bytes(0)), ("0.txt", b"eins"), ("1.txt", b"zwei")]
    rows += [("2.wav", b"no audio"), ("2.txt", b"drei"), ("3.wav", as_bytes(1)), ("3.json", b"{")]
    write_tar(tmp_path / "a.tar", rows)
    found, problems = sources.scan(str(tmp_path / "a.tar"))
    assert [u.text for u in found] == ["eins"]
    told = {p.where: p.message for p in problems}
    assert "no string under 'audio_filepath'" in told[f"{tmp_path}/a.tar:2"]
    assert "cannot be read as audio" in told[f"{tmp_path}/a.tar:3"]
    assert "a.tar: 3.json" in told[f"{tmp_path}/a.tar:4"]
    (tmp_path / "b.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="b.tar: not a tar"):
        sources.scan(str(tmp_path / "b.tar"))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(data[: data.index(b"2.wav") + 100])  # in a header
    with pytest.raises(ValueError, match="b.tar: .*it ends in the middle of a member"):
        sources.scan(str(tmp_path / "b.tar"))
    with pytest.raises(FileNotFoundError, match="c-1.tar: no such file"):
        write_tar(tmp_path / "c-0.tar", rows[:2])
        sources.scan(f"{tmp_path}/c-{{0..1}}.tar")


def test_a_shar_directory_is_read_as_lhotse_reads_it(tmp_path):
    lhotse = pytest.importorskip("lhotse")
    cuts = []
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", tone(i), 16000, subtype="PCM_16")
        recording = lhotse.Recording.from_file(tmp_path / f"{i}.wav", recording_id=f"r{i}")
        said = lhotse.SupervisionSegment(
            id=f"s{i}",
            recording_id=f"r{i}",
            start=0,
            duration=recording.duration,
            text=TEXTS[i],
            language="de",
            custom={"target_text": f"t{i}"},
        )
        cuts.append(lhotse.MonoCut(f"c{i}", 0, recording.duration, 0, [said], recording=recording))
    (tmp_path / "shar").mkdir()
    lhotse.CutSet.from_cuts(cuts).to_shar(tmp_path / "shar", {"recording": "flac"}, shard_size=3)
    found = check(tmp_path / "shar")
    theirs = list(lhotse.CutSet.from_shar(in_dir=tmp_path / "shar"))
    assert [u.id for u in found] == [cut.id for cut in theirs] and found[0].lang == "de"
    assert [dict(u.fields)["target_text"] for u in found] == ["t0", "t1", "t2", "t3"]
    for utterance, cut in zip(found, theirs, strict=True):
        np.testing.assert_allclose(sources.load_audio(utterance), cut.load_audio()[0], atol=1e-6)
    cuts = tmp_path / "shar" / "cuts.000000.jsonl.gz"
    lines = gzip.decompress(cuts.read_bytes()).splitlines()
    cuts.write_bytes(gzip.compress(b"\n".join([lines[0], b"{", lines[1]])))
    _, problems = sources.scan(str(tmp_path / "shar"))
    told = {p.where.rpartition("/")[2]: p.message for p in problems}
    assert told["shar:2"].startswith("Expecting property name")
    assert told["shar:3"].endswith("has 'c2.flac' in its place") and len(told) == 2
    cuts.write_bytes(gzip.compress(lines[0]))
    (problem,) = sources.scan(str(tmp_path / "shar"))[1]
    assert problem.where.endswith("recording.000000.tar:2")
    assert problem.message == "3 recordings for 1 cuts"
    cuts.write_bytes(gzip.compress(lines[0])[:20])
    with pytest.raises(ValueError, match="cuts.000000.jsonl.gz: not a gzip file, or damaged"):
        sources.scan(str(tmp_path / "shar"))
    cuts.unlink()
    (tmp_path / "shar" / "recording.000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="recording.000001.tar: no such file"):
        sources.scan(str(tmp_path / "shar"))
