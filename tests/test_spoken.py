"""Sentences from files: who speaks them, which are for training, and mixed with recordings."""

import itertools
import json
import math

import numpy as np
import pytest
import soundfile

from otreg_jax import config as config_lib
from otreg_jax.data import pipeline, sets, sources, spoken

GERMAN = [f"Satz Nummer {i} ist neu." for i in range(12)]
DUTCH = [f"Zin {i} is ook nieuw." for i in range(8)]


def config(tmp_path, **changes):
    (tmp_path / "de.txt").write_text("\n\n".join(GERMAN) + f"\n{GERMAN[0]}\n")
    (tmp_path / "nl.txt").write_text("\n".join(f" {line} " for line in DUTCH))
    c = config_lib.default()
    c.synthetic.sentences = f"de={tmp_path}/de.txt, nl={tmp_path}/nl.txt"
    c.synthetic.num_test, c.synthetic.silence = 3, (0.1, 0.5)
    c.update_from_flattened_dict(changes)
    return c


def test_sentences_are_split_and_every_language_is_tested(tmp_path):
    found = spoken.sets(config(tmp_path).synthetic)
    assert list(found) == ["train", "dev", "voices", "fast", "reverb", "noise"]
    train, dev = ({item.text for item in found[name]} for name in ("train", "dev"))
    assert train | dev == {*GERMAN, *DUTCH} and not train & dev
    assert len(found["train"]) == 14 and len(found["dev"]) == 6
    for item in itertools.chain(*found.values()):
        assert item.lang == ("de" if item.text in GERMAN else "nl")
        assert item.voice.startswith(f"{item.lang}+") and 25 <= item.pitch <= 75
        assert all(0.1 <= seconds <= 0.5 for seconds in item.silence)
    assert [lang for lang, _ in spoken.split(config(tmp_path).synthetic)[0]].count("nl") == 5


def test_voices_are_held_out_and_conditions_are_all_that_differs(tmp_path):
    found = spoken.sets(config(tmp_path, **{"synthetic.num_train": 2000}).synthetic)
    heard = {item.voice.partition("+")[2] for item in found["train"]}
    assert heard == set(spoken.TRAIN)
    assert {item.voice.partition("+")[2] for item in found["voices"]} <= set(spoken.OTHER)
    rates = {item.rate for item in found["train"]}
    assert min(rates) in range(120, 125) and max(rates) in range(216, 221)
    tested = [found[name] for name in ("dev", "fast", "noise", "voices")]
    for dev, fast, noise, other in zip(*tested, strict=True):
        assert noise == dev._replace(snr=10.0)
        assert other == dev._replace(voice=other.voice)
        assert fast == dev._replace(rate=fast.rate) and 1.25 < fast.rate / dev.rate < 1.35


def test_a_sentence_is_spoken_again_by_another_and_the_first_do_not_change(tmp_path):
    few = spoken.sets(config(tmp_path, **{"synthetic.num_train": 10}).synthetic)["train"]
    many = spoken.sets(config(tmp_path, **{"synthetic.num_train": 30}).synthetic)["train"]
    assert many[:10] == few
    assert [item.text for item in many[14:28]] == [item.text for item in many[:14]]
    assert many[14:28] != many[:14]
    other = spoken.sets(config(tmp_path, **{"synthetic.seed": 1}).synthetic)["train"]
    assert {item.text for item in other} != {item.text for item in many}


def test_accents_and_a_language_for_files_that_name_none(tmp_path):
    c = config(tmp_path)
    c.synthetic.sentences, c.synthetic.num_train = str(tmp_path / "nl.txt"), 100
    voices = {item.voice.partition("+")[0] for item in spoken.sets(c.synthetic)["train"]}
    assert voices == set(spoken.ACCENTS["en"])


@pytest.mark.parametrize(
    "contents, message",
    [
        (b"one\n...\n two\n?!\n", r"f.txt:2: nothing to be said in '...'\n.*f.txt:4: "),
        (b"\xff\xfe", "f.txt: not UTF-8 text"),
        (b"one\ntwo\n", "2 sentences of en, of which synthetic.num_test=3 .* none is left"),
        (b"", "0 sentences of en"),
    ],
)
def test_files_that_cannot_be_spoken_are_named(contents, message, tmp_path):
    c = config(tmp_path)
    (tmp_path / "f.txt").write_bytes(contents)
    c.synthetic.sentences = str(tmp_path / "f.txt")
    with pytest.raises(ValueError, match=message):
        spoken.sets(c.synthetic)
    c.synthetic.sentences = f"{tmp_path}/absent.txt"
    with pytest.raises(FileNotFoundError, match="synthetic.sentences: .*absent.txt: no such file"):
        spoken.sets(c.synthetic)


class Letters:
    def encode(self, text):
        return [ord(letter) % 50 for letter in text]


def test_spoken_sentences_beside_recordings(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(16000) / 20), 16000)
    line = {"audio_filepath": "a.wav", "text": "ein Ton", "duration": 1.0, "lang": "de"}
    (tmp_path / "real.jsonl").write_text(json.dumps(line) + "\n")
    changes = {"data.train": f"{tmp_path}/real.jsonl", "data.weights": (1.0, 3.0)}
    c = config(tmp_path, **changes, **{"synthetic.num_train": 7, "synthetic.num_test": 1})
    c.synthetic.conditions = {}
    found = sets.load_train(c, tmp_path)
    assert [u.text for u in found[:1]] == ["ein Ton"] and len(found) == 8
    assert {u.lang for u in found} == {"de", "nl"} and all(len(u.words) > 3 for u in found[1:])
    batches = pipeline.train_batches(found, Letters(), c.data, batch_size=4, seed=0, num_steps=2)
    index = np.concatenate([batch["index"] for batch in batches])
    assert (index == 0).sum() == 2  # a quarter of an epoch's eight
    # The dev set is that of the recordings, if there is one; the spoken one is evaluated beside it.
    assert [u.lang for u in sets.load_dev(c, tmp_path)] == ["de", "nl"]
    c.data.dev = c.data.train
    assert [u.text for u in sets.load_dev(c, tmp_path)] == ["ein Ton"]
    evaluated, problems = sets.load_eval(c, tmp_path)
    assert {name: len(us) for name, us in evaluated.items()} == {"dev": 1, "spoken": 2}
    assert not problems
    c.data.test = f"spoken={c.data.train}"
    with pytest.raises(ValueError, match="data.test: synthetic speech has sets of these names"):
        sets.load_eval(c, tmp_path)
    # What the model cannot take is refused as of any data.
    c.data.max_duration = 0.8
    c.data.train = ""
    with pytest.raises(ValueError, match="too_long"):
        sets.load_train(c, tmp_path)


def test_a_run_knows_the_longest_audio_it_was_trained_on(tmp_path):
    assert sets.longest_seconds(tmp_path) == math.inf  # of a run that does not say
    utterance = sources.Utterance("a", "a.wav", "a", 1.5, where="m:1")
    described = sets.describe([utterance, utterance._replace(duration=4.25)])
    assert described == {"utterances": 2, "hours": 0.0016, "longest_seconds": 4.25}
    (tmp_path / "data.json").write_text(json.dumps(described))
    assert sets.longest_seconds(tmp_path) == 4.25
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(ValueError, match="data.json: damaged, .* delete it to do without"):
        sets.longest_seconds(tmp_path)
