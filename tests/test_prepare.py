"""Corpora in, ArrayRecord out: contents, refusals, restarts, and data sets of others."""

import hashlib
import io
import json
import sys

import numpy as np
import pytest
import soundfile
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from otreg_jax import config as config_lib
from otreg_jax.data import corpora, prepare, prompts, records, sources

RATE = 16000


def write_audio(path, seconds=0.5, seed=0, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-1, 1, round(seconds * rate)), rate)


def write_manifest(folder, lines):
    path = folder / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


@pytest.fixture
def manifest(tmp_path):
    """Nine utterances of half a second in two languages."""
    lines = []
    for i in range(9):
        write_audio(tmp_path / f"{i}.wav", seed=i)
        line = {"audio_filepath": f"{i}.wav", "text": f"sätze {i}", "duration": 0.5}
        words = [["sätze", 0.0, 0.2], [str(i), 0.3, 0.5]]
        lines.append(line | {"lang": "de" if i < 6 else "en", "speaker": f"s{i}", "words": words})
    return write_manifest(tmp_path, lines)


def run(manifest, output, split="train", **settings):
    found = prepare.read_corpus("manifest", manifest, split)
    return prepare.prepare(*found, output, split, shard_hours=2 / 3600, **settings)


def load(path):
    return sources.load_utterances(str(path), config_lib.default().data, max_duration=30)


@pytest.fixture
def in_this_process(monkeypatch):
    """Writes shards without worker processes and returns the names of those written."""
    written = []

    def write(output, jobs, workers):
        for name, shard in jobs.items():
            written.append(name)
            prepare.write_shard(output / name, shard)

    monkeypatch.setattr(prepare, "_write_shards", write)
    return written


def test_a_prepared_data_set_holds_the_corpus(manifest, tmp_path):
    output = tmp_path / "out"
    report = run(manifest, output, workers=2)
    assert report["utterances"] == 9 and report["shards"] == 3 and report["speakers"] == 9
    assert report["hours_by_language"] == {"de": round(3 / 3600, 4), "en": round(1.5 / 3600, 4)}
    assert report["refused"] == {}
    before, after = load(manifest), load(output)
    for a, b in zip(before, after, strict=True):
        assert (a.id, a.text, a.lang, a.speaker, a.words) == (
            b.id,
            b.text,
            b.lang,
            b.speaker,
            b.words,
        )
        np.testing.assert_array_equal(sources.load_audio(a), sources.load_audio(b))
    for line in (output / "SHA256SUMS").read_text().splitlines():
        checksum, name = line.split("  ")
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == checksum


def test_a_prepared_data_set_serves_the_tasks_of_its_manifest(tmp_path, in_this_process, capsys):
    write_audio(tmp_path / "a.wav")
    rows = (
        {"text": "hallo", "source_lang": "de", "target_lang": "en", "target_text": "hello"},
        {"text": "call anna", "language": "English", "context": ["anna", "radio"], "votes": 2},
        {"text": "", "lang": "fr", "taskname": "asr"},
        {"lang": "de", "taskname": "lid", "scores": [0.5]},
        {"prompt": "Is it loud?", "answer": "yes", "lang": "en", "said": {"by": "anna"}},
        {"lang": "en"},
    )
    known = {"audio_filepath": "a.wav", "duration": 0.5}
    manifest = write_manifest(tmp_path, [known | {"id": i} | row for i, row in enumerate(rows)])
    report = run(manifest, tmp_path / "out")
    assert report["refused"] == {"empty_text": 1}
    assert "columns that are not used: 'said', 'scores'" in capsys.readouterr().out
    config = config_lib.default()
    with config.unlocked():
        config.tasks = {
            "transcribe": {"prompts": ("{language} {context} {speech}",)},
            "translate": {"prompts": ("{target_language} {speech}",)},
            "identify": {"prompts": ("{speech}",)},
            "answer": {"prompts": ("{prompt} {votes|0} {speech}",)},
        }
    served = []
    for path in (manifest, str(tmp_path / "out")):
        found, _ = sources.scan(path, require_text=False, columns=prompts.columns(config))
        items, problems = prompts.expand([u for u in found if u.id != "5"], config)
        assert not problems
        served.append([u._replace(audio="", where="") for u in items])
    assert served[0] == served[1]
    assert {u.task for u in served[1]} == set(config.tasks)
    assert [(u.text, u.task) for u in served[1] if u.id == "2"] == [("", "transcribe")]


def test_tfds_reads_it_without_tensorflow(manifest, tmp_path, in_this_process):
    import tensorflow_datasets as tfds

    run(manifest, tmp_path / "out")
    run(manifest, tmp_path / "out", split="dev")
    source = tfds.builder_from_directory(tmp_path / "out").as_data_source()
    assert set(source) == {"train", "dev"} and len(source["train"]) == 9
    example, utterance = source["train"][7], load(f"{tmp_path / 'out'}:dev")[7]
    assert example["text"].decode() == utterance.text == "sätze 7"
    assert example["duration"] == 0.5
    np.testing.assert_array_equal(example["audio"] / 32768, sources.load_audio(utterance))
    assert "tensorflow" not in sys.modules


def test_refusals_are_counted_and_named(tmp_path, in_this_process):
    for name, seconds in (("good", 0.5), ("long", 2.0), ("short", 0.2), ("same", 0.5)):
        write_audio(tmp_path / f"{name}.wav", seconds)
    (tmp_path / "broken.wav").write_text("not audio")
    line = {"text": "a", "duration": 0.5}
    lines = [
        line | {"audio_filepath": "good.wav"},
        line | {"audio_filepath": "long.wav", "duration": 2.0},
        line | {"audio_filepath": "short.wav"},
        line | {"audio_filepath": "broken.wav"},
        line | {"audio_filepath": "same.wav", "text": ""},
        line | {"audio_filepath": "good.wav"},
    ]
    manifest = write_manifest(tmp_path, lines)
    report = run(manifest, tmp_path / "out", max_duration=1.0)
    kinds = ("too_long", "duration_mismatch", "unreadable", "empty_text", "duplicate_id")
    assert report["utterances"] == 1 and report["refused"] == dict.fromkeys(kinds, 1)
    refused = [json.loads(x) for x in (tmp_path / "out/refused-train.jsonl").open()]
    places = {r["kind"]: r["where"].rpartition(":")[2] for r in refused}
    assert places == dict(zip(kinds, "23456", strict=True))
    with pytest.raises(ValueError, match="nothing is left to write: .*too_long 4"):
        run(manifest, tmp_path / "none", max_duration=0.1)


def test_a_killed_run_goes_on_with_the_shards_it_had_not_finished(
    manifest, tmp_path, in_this_process
):
    output = tmp_path / "out"
    report = run(manifest, output)
    names = list(in_this_process)
    contents = {name: (output / name).read_bytes() for name in names}
    # As a kill leaves it: one shard half written, one whole but without its summary.
    (output / names[1]).rename(output / f".{names[1]}.unfinished")
    for name in names[1:]:
        (output / f".{name}.json").unlink()
    in_this_process.clear()
    assert run(manifest, output) == report
    assert in_this_process == names[1:]
    assert {name: (output / name).read_bytes() for name in names} == contents
    assert not list(output.glob(".*unfinished"))
    assert len(load(output)) == 9


def test_machines_share_the_shards(manifest, tmp_path, in_this_process):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    report = run(manifest, whole)
    names = list(in_this_process)
    in_this_process.clear()
    assert run(manifest, shared, machine=(0, 2)) is None
    assert in_this_process == names[::2]
    assert run(manifest, shared, machine=(1, 2)) == report
    assert in_this_process == names[::2] + names[1::2]
    for name in [*names, "dataset_info.json", "SHA256SUMS", "train.jsonl"]:
        assert (shared / name).read_bytes() == (whole / name).read_bytes()


def test_apache_beam_writes_the_same(manifest, tmp_path, in_this_process):
    pytest.importorskip("apache_beam", reason="the beam extra is not installed")
    run(manifest, tmp_path / "here")
    run(manifest, tmp_path / "beam", beam=["--runner=DirectRunner"])
    files = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
    written = files(tmp_path / "beam")
    assert len([name for name in written if name.startswith("speech-train")]) > 1
    assert written == files(tmp_path / "here")


def test_apache_beam_is_asked_for_by_name(manifest, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ImportError, match="pip install apache-beam"):
        run(manifest, tmp_path / "beam", beam=[])


def test_other_input_does_not_mix_with_what_is_there(manifest, tmp_path, in_this_process):
    run(manifest, tmp_path / "out")
    with pytest.raises(ValueError, match="made from other input or with other settings"):
        prepare.prepare(load(manifest)[:5], [], tmp_path / "out", "train")
    (tmp_path / "out" / in_this_process[0]).unlink()
    with pytest.raises(FileNotFoundError, match="no whole split 'train'.*2 of 3 shards"):
        records.read_audio(records.address(tmp_path / "out", "train", 0))
    with pytest.raises(FileNotFoundError, match="no whole split 'test'.*splits here: train"):
        load(f"{tmp_path / 'out'}:test")


def test_what_is_beyond_full_scale_is_scaled_as_in_direct_reading(
    tmp_path, in_this_process, capsys
):
    loud = 5 * np.random.default_rng(0).uniform(-1, 1, RATE // 2)
    soundfile.write(tmp_path / "loud.wav", loud, RATE, subtype="FLOAT")
    write_audio(tmp_path / "plain.wav")
    lines = [
        {"audio_filepath": f"{n}.wav", "text": "a", "duration": 0.5} for n in ("loud", "plain")
    ]
    manifest = write_manifest(tmp_path, lines)
    report = run(manifest, tmp_path / "out")
    assert report["odd"] == {"over_full_scale": [f"{manifest}:1"]}
    assert "over_full_scale 1: samples beyond 1.5 of full scale" in capsys.readouterr().out
    for before, after in zip(load(manifest), load(tmp_path / "out"), strict=True):
        samples = sources.load_audio(before)
        np.testing.assert_allclose(sources.load_audio(after), samples, atol=2 / 32768)
        assert np.abs(samples).max() > 0.999 and (np.abs(samples) > 0.999).mean() < 0.01


def test_damaged_records_and_indices_are_named(manifest, tmp_path, in_this_process):
    output = tmp_path / "out"
    run(manifest, output)
    index = output / "train.jsonl"
    whole = index.read_text()
    index.write_text(whole[:-40])
    with pytest.raises(ValueError, match="train.jsonl: not the index of this data set .*remove it"):
        load(output)
    index.write_text(whole[: whole.rindex("\n", 0, -1) + 1])
    with pytest.raises(ValueError, match="8 lines for 9 records"):
        load(output)
    index.write_text(whole)
    first, *_ = load(output)
    for audio in ("record:x", f"record:{output}:train:99", f"record:{output}:train:-1"):
        with pytest.raises(sources.BadAudio, match="no record:FOLDER|not so many records"):
            sources.load_audio(first._replace(audio=audio))
    (output / "features.json").write_text('{"featuresDict": []}')
    records.schema.cache_clear()
    with pytest.raises(ValueError, match="are not as TFDS writes them"):
        sources.load_audio(first)


# ---- data sets of others -------------------------------------------------------------------------


def write_audio_feature_data_set(folder, audio, rate, lazy):
    """A split as TFDS writes it for the feature Audio: samples as int64, or the file's bytes."""
    text = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
    audio_class = "tensorflow_datasets.core.features.audio_feature.Audio"
    details = {"dtype": "int64", "sampleRate": str(rate), "lazyDecode": lazy}
    features = {
        "voice": {"pythonClassName": audio_class, "audio": details},
        "sentence": text,
        "client_id": text,
    }
    folder.mkdir()
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    (folder / "dataset_info.json").write_text(json.dumps({"name": "voices"}))
    writer = ArrayRecordWriter(str(folder / "voices-train.array_record-00000-of-00001"), "")
    for i, samples in enumerate(audio):
        example = tf_example_pb2.Example()
        feature = example.features.feature
        if lazy:
            file = io.BytesIO()
            soundfile.write(file, samples, rate, format="FLAC")
            feature["voice"].bytes_list.value.append(file.getvalue())
        else:
            feature["voice"].int64_list.value.extend(samples.tolist())
        feature["sentence"].bytes_list.value.append(f"größe {i}".encode())
        feature["client_id"].bytes_list.value.append(b"c")
        writer.write(example.SerializeToString())
    writer.close()


@pytest.mark.parametrize("lazy", [False, True])
def test_reads_data_sets_that_others_prepared(tmp_path, lazy):
    rng = np.random.default_rng(0)
    audio = [rng.integers(-(2**15), 2**15, n).astype(np.int16) for n in (4000, 8000)]
    write_audio_feature_data_set(tmp_path / "voices", audio, 8000, lazy)
    utterances = load(tmp_path / "voices")
    assert [(u.text, u.speaker, u.duration) for u in utterances] == [
        ("größe 0", "c", 0.5),
        ("größe 1", "c", 1.0),
    ]
    loaded = sources.load_audio(utterances[1], sample_rate=8000)
    np.testing.assert_array_equal(loaded, audio[1] / 32768)
    assert len(sources.load_audio(utterances[1])) == 16000
    assert load(tmp_path / "voices") == utterances  # from the index that the first call left
    assert (tmp_path / "voices" / "train.jsonl").exists()


def test_records_without_audio_are_named(tmp_path):
    audio = [np.zeros(n, np.int16) for n in (8000, 0)]
    write_audio_feature_data_set(tmp_path / "voices", audio, 8000, lazy=False)
    with pytest.raises(ValueError, match="voices:train:1: duration is 0"):
        load(tmp_path / "voices")
    (utterance,) = sources.scan(str(tmp_path / "voices"))[0]
    empty = utterance._replace(audio=records.address(tmp_path / "voices", "train", 1))
    with pytest.raises(sources.BadAudio, match="record:.*:train:1 holds no audio"):
        sources.load_audio(empty)


# ---- corpora -------------------------------------------------------------------------------------


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def librispeech(root):
    write_audio(root / "dev-clean/84/121123/84-121123-0000.flac")
    write_text(root / "dev-clean/84/121123/84-121123.trans.txt", "84-121123-0000 GO DO\n")
    return root, "dev-clean", ("GO DO", "en", "84")


def mls(root):
    root = root / "mls_german"
    write_audio(root / "dev/audio/12/34/12_34_000001.flac")
    write_text(root / "dev/transcripts.txt", "12_34_000001\tschöne tage\n")
    return root, "dev", ("schöne tage", "de", "12")


def common_voice(root):
    root = root / "nl"
    write_audio(root / "clips/common_voice_nl_1.mp3")
    header = "client_id\tpath\tsentence\tup_votes\tlocale\n"
    write_text(root / "dev.tsv", header + 'c1\tcommon_voice_nl_1.mp3\tZeg "ja\t2\tnl\n')
    return root, "dev", ('Zeg "ja', "nl", "c1")


def fleurs(root):
    root = root / "sv_se"
    write_audio(root / "audio/dev/1.wav")
    write_text(root / "dev.tsv", "7\t1.wav\tDu är.\tdu är\td u | ä r\t8000\tMALE\n")
    return root, "dev", ("du är", "sv", "")


def voxpopuli(root):
    root = root / "fr"
    write_audio(root / "2017/20170613-x-fr_1.ogg")
    header = "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender\n"
    write_text(root / "asr_dev.tsv", header + "20170613-x-fr_1\tOui.\toui\t9\tdev\tfemale\n")
    return root, "dev", ("oui", "fr", "9")


def aishell(root):
    write_audio(root / "wav/dev/S0002/BAC009S0002W0122.wav")
    lines = "BAC009S0002W0122 而 对 楼市\nBAC009S0724W0121 另 一 个 划分\n"
    write_text(root / "transcript/aishell_transcript_v0.8.txt", lines)
    return root, "dev", ("而对楼市", "zh", "S0002")


def test_mls_folders_are_named_by_a_language_or_its_code(tmp_path):
    root, split, _ = mls(tmp_path)
    for name, lang in (("mls_german_opus", "de"), ("mls_de", "de"), ("mls_parts", "")):
        root = root.rename(tmp_path / name)
        (_, line), *_ = corpora.mls(root, split)
        assert line["lang"] == lang


@pytest.mark.parametrize("layout", corpora.LAYOUTS)
def test_published_layouts(layout, tmp_path, monkeypatch):
    root, split, expected = globals()[layout](tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    utterances, problems = prepare.read_corpus(layout, str(root.relative_to(tmp_path)), split)
    assert problems == []
    (utterance,) = utterances
    assert (utterance.text, utterance.lang, utterance.speaker) == expected
    assert len(sources.load_audio(utterance)) == pytest.approx(RATE / 2, abs=1200)


def test_upper_case_corpora_come_in_lower_case_if_asked(tmp_path):
    root, split, _ = librispeech(tmp_path)
    (utterance,), _ = prepare.read_corpus("librispeech", str(root), split, lower_case=True)
    assert utterance.text == "go do"
    write_audio(tmp_path / "a.wav")
    line = {"audio_filepath": "a.wav", "text": "IŞIK", "lang": "Turkish"}
    line["words"] = [["IŞIK", 0.0, 0.4]]
    manifest = write_manifest(tmp_path, [line])
    (utterance,), _ = prepare.read_corpus("manifest", manifest, "", lower_case=True)
    assert utterance.text == utterance.words[0][0] == "ışık"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"84-121123-0000 GO \xff\n", "84-121123.trans.txt:1: byte 18 is not UTF-8"),
        (b"", "no split 'dev-clean'"),
    ],
)
def test_damaged_transcripts_are_named(tmp_path, content, message):
    root, split, _ = librispeech(tmp_path)
    (root / "dev-clean/84/121123/84-121123.trans.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare.read_corpus("librispeech", str(root), split)


def test_tables_without_their_columns_are_named(tmp_path):
    root, split, _ = common_voice(tmp_path)
    write_text(root / "dev.tsv", "client_id\tsentence\nc\thallo\n")
    with pytest.raises(ValueError, match="dev.tsv:1: no column path in the header"):
        prepare.read_corpus("common_voice", str(root), split)


def test_absent_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="no split 'train'"):
        prepare.read_corpus("librispeech", str(tmp_path), "train")
