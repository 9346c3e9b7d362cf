"""Large data sets are read once: what an index gives is what reading gives, to the bit."""

import json
import os
import pickle

import numpy as np
import pytest
import soundfile

from otreg_jax import agreement
from otreg_jax import config as config_lib
from otreg_jax.data import bucketing, index, manifest, pipeline, prompts, sets


class Letters:
    """A tokenizer with a token a letter; counts what it writes."""

    fingerprint, control, unk_id, eos_id, adds_bos, chat_template = "letters", {}, 0, 2, False, None

    def __init__(self):
        self.written = 0

    def encode(self, text):
        self.written += 1
        return [*map(ord, text)]

    def encode_prompt(self, text):
        first, rest = text.split("{speech}")
        return [*map(ord, first), None, *map(ord, rest)]


@pytest.fixture(autouse=True)
def always_indexed(monkeypatch, tmp_path):
    monkeypatch.setattr(index, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """24 recordings in two manifests: four lines cannot be used, two are too long, of which one has
    word times; some have columns that templates name."""
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for name, start in (("a", 0), ("b", 12)):
        lines = []
        for i in range(start, start + 12):
            samples = 25600 if i in (2, 3) else int(rng.integers(1600, 12800))
            audio = f"audio/{i}.wav"
            soundfile.write(tmp_path / audio, 0.1 * rng.standard_normal(samples), 16000)
            text = "één twee" if i in (2, 3) else "".join(rng.choice(list("abc"), size=1 + i % 7))
            line = {"audio_filepath": audio, "text": text, "duration": samples / 16000}
            line |= {"lang": "nl" if i % 3 else "fr", "speaker": f"s{i % 4}"}
            if i % 2:
                line |= {
                    "target_text": text[::-1] + "!",
                    "target_lang": "de",
                    "context": ["x", "y"],
                }
            if i == 2:
                line["words"] = [["één", 0.1, 0.6], ["twee", 0.9, 1.5]]
            lines.append(json.dumps(line, ensure_ascii=False))
        lines += ["{", json.dumps({"audio_filepath": f"audio/no{start}.wav", "text": "a"})]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def config_of(folder, **changes):
    config = config_lib.default()
    config.data.train = f"{folder}/a.jsonl,{folder}/b.jsonl"
    config.data.on_bad_audio, config.data.long_audio = "skip", "chunk"
    config.data.max_duration, config.prompt, config.data.num_buckets = 1.0, "{speech}", 3
    config.update_from_flattened_dict(changes)
    return config


TASKS = {
    "data.mixture": "lang",
    "data.temperature": 2.0,
    "data.distractors": 2,
    "tasks": {
        "transcribe": {"prompts": ("{speech} {language}", "{speech} [[{context}]]")},
        "translate": {"prompts": ("{speech} {target_lang}",), "weight": 2.0},
    },
}


def start(config, workdir):
    """What a start finds, tells and batches: utterances, corpus, used tokens, batches, ..."""
    workdir.mkdir()
    tokenizer = Letters()
    utterances = sets.load_train(config, workdir, str(workdir / "skipped.jsonl"))
    prompter = prompts.make(config, tokenizer, utterances)
    corpus = bucketing.make_corpus(utterances, tokenizer, prompter)
    used = bucketing.used_tokens(corpus, tokenizer, prompter)
    options = dict(batch_size=4, seed=1, num_steps=9, prompter=prompter, corpus=corpus)
    batches = list(pipeline.train_batches(utterances, tokenizer, config.data, **options))
    files = {path.name: path.read_text() for path in sorted(workdir.iterdir())}
    said = [files, agreement.corpus(utterances), sets.describe(utterances), used, prompter.words]
    return utterances, corpus, said, batches, tokenizer.written


@pytest.mark.parametrize(
    "changes",
    [{}, {"data.weights": (1.0, 2.0), "data.max_utterances": 17}, TASKS],
    ids=["plain", "weights", "tasks"],
)
def test_a_start_from_an_index_is_a_start(folder, changes, monkeypatch, capsys):
    config, found = config_of(folder, **changes), []
    for name in ("indexing", "indexed", "plain"):
        if name == "plain":
            monkeypatch.setattr(index, "SMALL", 2**40)
        found.append((*start(config, folder / name), capsys.readouterr().out.replace(name, "")))
    (*_, first), (mapped, _, _, _, written, second), (plain, corpus, said, batches, _, third) = (
        found
    )
    assert type(mapped) is index.Utterances and type(plain) is list and list(mapped) == plain
    assert mapped[-1] == plain[-1] and mapped[2:9:3] == plain[2:9:3] and written == 0
    with pytest.raises(IndexError):
        mapped[len(plain)]
    for _, theirs, told, theirs_batches, *_ in found[:2]:
        assert told == said and {"skipped.jsonl", "segments.jsonl"} == told[0].keys()
        for ours, other in zip(corpus[1:], theirs[1:], strict=True):
            np.testing.assert_array_equal(ours, other)
        for batch, other in zip(batches, theirs_batches, strict=True):
            assert batch.keys() == other.keys()
            assert all(np.array_equal(batch[key], other[key]) for key in batch)
    # What tells of bad lines stands in all three; which columns nothing reads is said on reading.
    keep = lambda text: [line for line in text.splitlines() if "columns that are not" not in line]
    assert keep(first) == keep(second) == keep(third) and "skipped 4 unusable" in second


def test_an_index_of_other_files_settings_or_code_is_not_used(folder, monkeypatch):
    read = []
    scan = manifest.check_lines
    monkeypatch.setattr(manifest, "check_lines", lambda *a, **k: read.append(1) or scan(*a, **k))

    def is_read(**changes) -> bool:
        read.clear()
        utterances = sets.load_train(config_of(folder, **changes), folder)
        assert type(utterances) is index.Utterances
        return bool(read)

    assert is_read() and not is_read()
    assert is_read(**{"data.max_duration": 0.5}) and is_read(**{"data.max_utterances": 3})
    assert not is_read(batch_size=3, **{"data.num_buckets": 1})
    text = (folder / "b.jsonl").read_text()
    (folder / "b.jsonl").write_text(text.replace("s1", "s9"))  # as long as before
    os.utime(folder / "b.jsonl", ns=(1, 1))
    assert is_read() and not is_read()
    samples = np.zeros(8000)
    soundfile.write(folder / "audio/no0.wav", samples, 16000)  # it was missing
    assert is_read() and not is_read()
    monkeypatch.setattr(index, "_code", lambda: 1)
    assert is_read() and not is_read()
    stored = folder / "cache/otreg_jax/index"
    kept = [json.loads(path.read_text())["folder"] for path in stored.glob("*.json")]
    assert sorted(kept) == sorted(path.name for path in stored.iterdir() if path.is_dir())


def test_without_a_place_for_it_data_are_read_each_time(folder, capsys, monkeypatch):
    (folder / "cache").write_text("a file, where a folder should be")
    utterances = sets.load_train(config_of(folder), folder)
    assert type(utterances) is list and "no index can be kept there" in capsys.readouterr().out


def test_what_goes_to_a_worker_process_is_the_name_of_the_files(folder):
    utterances = sets.load_train(config_of(folder), folder)
    corpus = bucketing.make_corpus(utterances, Letters())
    again = pickle.loads(pickle.dumps(corpus))
    assert list(again.utterances) == list(utterances)
    assert again.tokens.filename == corpus.tokens.filename
    part = pickle.loads(pickle.dumps(corpus.tokens[3:9]))
    np.testing.assert_array_equal(part, corpus.tokens[3:9])
    assert b"tokens.npy" in pickle.dumps(corpus.tokens) and corpus.tokens.nbytes > 100


def test_the_files_of_every_kind_of_data_set_are_looked_at(tmp_path):
    (tmp_path / "set/deeper").mkdir(parents=True)
    for name in ("a.jsonl", "set/x.parquet", "set/deeper/y.arrow", "t-00.tar", "t-01.tar"):
        (tmp_path / name).write_text("content")
    files = lambda name: sorted(index._files([f"{tmp_path}/{name}"]))
    in_set = [f"{tmp_path}/set/deeper/y.arrow", f"{tmp_path}/set/x.parquet"]
    assert files("a.jsonl") == [f"{tmp_path}/a.jsonl"]
    assert files("set") == files("set:train") == in_set
    assert files("t-{00..01}.tar") == [f"{tmp_path}/t-00.tar", f"{tmp_path}/t-01.tar"]
    assert index._files([f"file://{tmp_path}/a.jsonl"]) == [f"{tmp_path}/a.jsonl"]
    assert index._stamps([f"{tmp_path}/none"]) == {f"{tmp_path}/none": None}


def test_an_index_that_is_not_whole_is_made_anew(folder):
    lines = sets.load_train(config_of(folder), folder).folder / "lines"
    lines.write_bytes(lines.read_bytes()[:-9])
    again = sets.load_train(config_of(folder), folder)
    assert again.folder != lines.parent and len(list(again)) == 24
