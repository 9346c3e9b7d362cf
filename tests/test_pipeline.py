"""Batches: the same whoever reads them, every utterance in its turn, in shapes that pad little."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
import soundfile

from otreg_jax import config as config_lib
from otreg_jax.data import augment, features, pipeline, sources

RATE = 16000


class Letters:
    """A tokenizer with a token a letter."""

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]


def data_config(**changes):
    config = config_lib.default().data
    config.update_from_flattened_dict({"num_buckets": 3, **changes})
    return config


def write_corpus(folder, count, seed=0, lang="en"):
    """`count` recordings of 0.05 to 0.6 s; longer ones have longer transcripts."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        samples = int(rng.integers(800, 9600))
        name = f"{lang}{i}.wav"
        soundfile.write(folder / name, 0.3 * rng.standard_normal(samples).clip(-3, 3), RATE)
        text = "".join(rng.choice(list("abcdef"), size=1 + samples // 1500))
        duration = samples / RATE
        line = {"audio_filepath": name, "text": text, "duration": duration, "lang": lang}
        lines.append(json.dumps(line))
    path = folder / f"{lang}.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return sources.read_manifest(write_corpus(folder, 37))


@pytest.fixture(scope="module")
def augmented(tmp_path_factory):
    """A configuration with every random change of the audio on."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(1)
    soundfile.write(folder / "noise.wav", rng.uniform(-0.5, 0.5, 5000), RATE)
    soundfile.write(folder / "rir.wav", rng.standard_normal(800) * 0.99 ** np.arange(800), RATE)
    for name in ("noise", "rir"):
        line = {"audio_filepath": f"{name}.wav"}
        (folder / f"{name}.jsonl").write_text(json.dumps(line))
    return data_config(
        **{
            "augment.speeds": (0.9, 1.0, 1.1),
            "augment.noise": str(folder / "noise.jsonl"),
            "augment.rir": str(folder / "rir.jsonl"),
        }
    )


def train(corpus, config, steps, **keywords):
    keywords = {"batch_size": 8, "seed": 3, **keywords}
    return pipeline.train_batches(corpus, Letters(), config, num_steps=steps, **keywords)


def digest(batch) -> str:
    content = hashlib.sha256()
    for key in sorted(batch):
        content.update(f"{key} {batch[key].shape} {batch[key].dtype}".encode())
        content.update(np.ascontiguousarray(batch[key]).tobytes())
    return content.hexdigest()


def global_digests(corpus, config, steps, hosts, **keywords):
    shares = [
        train(corpus, config, steps, host_index=h, host_count=hosts, **keywords)
        for h in range(hosts)
    ]
    return [
        digest({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
        for parts in zip(*shares, strict=True)
    ]


@pytest.fixture(scope="module")
def reference(corpus, augmented):
    return global_digests(corpus, augmented, 200, hosts=1)


def test_augmented_batches_differ_from_each_other_and_between_seeds(corpus, augmented, reference):
    assert len(set(reference)) == 200
    assert set(global_digests(corpus, augmented, 5, hosts=1, seed=4)).isdisjoint(reference)


@pytest.mark.parametrize("hosts", [2, 4])
def test_same_batches_from_any_number_of_hosts(corpus, augmented, reference, hosts):
    assert global_digests(corpus, augmented, 200, hosts) == reference


@pytest.mark.parametrize("workers", [1, 2])
def test_same_batches_from_worker_processes(corpus, augmented, reference, workers):
    config = augmented.copy_and_resolve_references()
    config.num_workers = workers
    assert global_digests(corpus, config, 200, hosts=1) == reference


@pytest.mark.parametrize("start", [5, 123])
def test_same_batches_after_a_restart(corpus, augmented, reference, start):
    assert global_digests(corpus, augmented, 200, hosts=1, start_step=start) == reference[start:]


def test_every_epoch_holds_every_utterance(corpus):
    batches = list(train(corpus, data_config(), 15))
    epochs = [np.concatenate([b["index"] for b in batches[e : e + 5]]) for e in (0, 5, 10)]
    for index in epochs:
        counts = Counter(index.tolist())
        assert set(counts) == set(range(37)) and counts.total() == 40  # 3 complete the last batch
    assert not np.array_equal(epochs[0], epochs[1])


def test_batch_holds_the_utterances_it_names(corpus):
    for batch in train(corpus, data_config(), 5, frontend=features.Frontend(width=128)):
        assert {key: value.dtype.name for key, value in batch.items()} == {
            "mel": "float32",
            "mel_length": "int32",
            "tokens": "int32",
            "token_length": "int32",
            "index": "int32",
        }
        for i, row in enumerate(batch["index"]):
            mel = features.log_mel(sources.load_audio(corpus[row]), 128)
            tokens = Letters().encode(corpus[row].text)
            assert batch["mel_length"][i] == len(mel)
            np.testing.assert_array_equal(batch["mel"][i, : len(mel)], mel)
            np.testing.assert_array_equal(batch["tokens"][i, : batch["token_length"][i]], tokens)


def test_features_inside_the_step_are_those_of_the_host(corpus):
    log_mel = jax.jit(features.log_mel_jnp, static_argnums=2)
    on_host = train(corpus, data_config(), 3)
    in_step = train(corpus, data_config(features="step"), 3)
    for host, step in zip(on_host, in_step, strict=True):
        mel, mel_length = log_mel(step["audio"], step["audio_length"], 80)
        np.testing.assert_array_equal(mel_length, host["mel_length"])
        np.testing.assert_allclose(mel, host["mel"], atol=1e-4)


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_every_utterance_once(corpus, hosts):
    config = data_config()
    shares = [
        list(
            pipeline.eval_batches(
                corpus, Letters(), config, batch_size=8, host_index=h, host_count=hosts
            )
        )
        for h in range(hosts)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    index = np.concatenate([b["index"] for b in batches])
    token_length = np.concatenate([b["token_length"] for b in batches])
    assert sorted(index[index >= 0]) == list(range(37))
    assert (index < 0).sum() == 3 and not token_length[index < 0].any()
    assert all((b["mel_length"] > 0).all() for b in batches)


COUNT_STEPS = """
import sys
from otreg_jax import config as config_lib
from otreg_jax.data import pipeline, sources

class Letters:
    def encode(self, text):
        return [ord(letter) for letter in text]

manifest, host = sys.argv[1], int(sys.argv[2])
utterances = sources.read_manifest(manifest)
hosts = dict(batch_size=8, host_index=host, host_count=2)
config = config_lib.default().data
evaluated = list(pipeline.eval_batches(utterances, Letters(), config, **hosts))
trained = list(pipeline.train_batches(utterances, Letters(), config, seed=0, num_steps=11, **hosts))
rows = [int(row) for batch in evaluated for row in batch["index"] if row >= 0]
print(len(evaluated), len(trained), [b["mel"].shape[1] for b in evaluated + trained], rows, sep="|")
"""


def test_hosts_in_processes_of_their_own_take_the_same_steps(corpus):
    manifest = corpus[0].where.rpartition(":")[0]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT_STEPS, manifest, str(host)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    said = [host.communicate(timeout=100)[0].strip().splitlines()[-1].split("|") for host in hosts]
    assert [s[:2] for s in said] == [["5", "11"]] * 2
    assert said[0][2] == said[1][2]  # the same shape at every step: no host waits
    assert sorted(sum((json.loads(s[3]) for s in said), [])) == list(range(37))


# ---- shapes --------------------------------------------------------------------------------------


def test_plan_is_printed_with_its_padding(corpus, capsys):
    next(train(corpus, data_config(), 1))
    printed = capsys.readouterr().out
    assert "37 utterances" in printed and "5 steps an epoch" in printed
    assert printed.count(" tokens: ") == 3 and "% of frames" in printed


def test_a_bucket_for_one_long_clip_is_seen(tmp_path, capsys):
    short = write_corpus(tmp_path, 64)
    soundfile.write(tmp_path / "long.wav", np.full(8 * RATE, 0.1), RATE)
    line = {"audio_filepath": "long.wav", "text": "ab", "duration": 8.0}
    (tmp_path / "long.jsonl").write_text(json.dumps(line))
    utterances = sources.read_manifest(short) + sources.read_manifest(tmp_path / "long.jsonl")
    next(train(utterances, data_config(), 1))
    printed = capsys.readouterr().out.splitlines()
    (wide,) = [line for line in printed if "bucket of 800 frames" in line]
    # The clip in a batch with seven of at most 0.6 s.
    assert "1 of 9 steps, 8 rows each" in wide and 12 <= int(re.search(r"(\d+)%", wide)[1]) < 20


def test_what_is_odd_is_named_at_the_start(tmp_path, capsys, monkeypatch):
    write_corpus(tmp_path, 12)
    soundfile.write(tmp_path / "en3.wav", np.zeros(8000), RATE)
    lines = [json.loads(line) for line in (tmp_path / "en.jsonl").read_text().splitlines()]
    lines[3]["duration"] = 0.5
    (tmp_path / "en.jsonl").write_text("\n".join(map(json.dumps, lines)))
    utterances = sources.read_manifest(tmp_path / "en.jsonl")
    for memory, heard in ((2**30, 12), (0, 4)):
        monkeypatch.setattr(pipeline, "MEMORY_BYTES", memory)
        monkeypatch.setattr(pipeline, "NUM_HEARD", 4)
        next(train(utterances, data_config(), 1))
        printed = capsys.readouterr().out
        assert f"1 of {heard} utterances can be used, but are odd" in printed
        assert "silent 1: no sample above -80 dB" in printed and "en.jsonl:4" in printed


def test_a_noise_that_cannot_be_read_is_named(corpus, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    line = {"audio_filepath": "noise.wav", "duration": 1.0}
    (tmp_path / "noise.jsonl").write_text(json.dumps(line))
    changes = {"augment.noise": str(tmp_path / "noise.jsonl"), "augment.noise_prob": 1.0}
    with pytest.raises(ValueError, match="noise.jsonl:1: .*noise.wav cannot be read as audio"):
        next(train(corpus, data_config(**changes), 1))
    skipped = tmp_path / "skipped.jsonl"
    config = data_config(on_bad_audio="skip", **changes)
    batch = next(train(corpus, config, 1, skipped_path=str(skipped)))
    assert (batch["index"] >= 0).all()
    assert json.loads(skipped.read_text().splitlines()[0])["where"].endswith("noise.jsonl:1")


# ---- mixtures ------------------------------------------------------------------------------------


def test_temperature_draws_small_languages_more_often(tmp_path, capsys):
    big = sources.read_manifest(write_corpus(tmp_path, 64, lang="en"))
    small = sources.read_manifest(write_corpus(tmp_path, 4, seed=1, lang="nl"))
    config = data_config(mixture="lang", temperature=2.0)
    batches = list(train(big + small, config, 3 * 17, batch_size=4))
    index = np.concatenate([b["index"] for b in batches]).reshape(3, 68)
    drawn = (index >= 64).sum(axis=1)
    # sqrt(64) : sqrt(4) = 8 : 2, of 68 a fifth: 13.6
    assert ((drawn == 13) | (drawn == 14)).all()
    seen = Counter(index[index < 64].tolist())
    assert max(seen.values()) - min(seen[row] for row in range(64)) <= 1  # in turn, over epochs
    assert "of an epoch from nl (4 utterances)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="data.mixture='language' is not one of"):
        train(big, data_config(mixture="language"), 1)


def test_weights_are_the_shares_of_manifests_in_the_order_they_come(tmp_path, capsys):
    # "zz" comes first, though it is not the first by name.
    first = sources.read_manifest(write_corpus(tmp_path, 8, lang="zz"))
    second = sources.read_manifest(write_corpus(tmp_path, 32, seed=1, lang="aa"))
    config = data_config(weights=(3, 1))
    batches = list(train(first + second, config, 20, batch_size=4))
    index = np.concatenate([b["index"] for b in batches]).reshape(2, 40)
    assert ((index < 8).sum(axis=1) == 30).all()  # of 40 three quarters
    assert "75.0% of an epoch from" in capsys.readouterr().out
    seen = Counter(index[index >= 8].tolist())
    assert len(seen) == 20 and set(seen.values()) == {1}  # in turn, over epochs
    again = list(train(first + second, config, 20, batch_size=4, start_step=13))
    np.testing.assert_array_equal(again[0]["index"], batches[13]["index"])
    for weights in ((1,), (1, 2, 3), (1, 0)):
        with pytest.raises(ValueError, match=r"one number above 0 .*zz.jsonl, .*aa.jsonl"):
            train(first + second, data_config(weights=weights), 1)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Ten utterances, of which rows 2 and 5 turn out to be unreadable."""
    utterances = sources.read_manifest(write_corpus(tmp_path, 10))
    for row in (2, 5):
        (tmp_path / f"en{row}.wav").write_text("not audio")
    return utterances


def test_unusable_audio_is_listed_at_once(damaged):
    with pytest.raises(ValueError) as error:
        train(damaged, data_config(), 3, batch_size=4)
    message = str(error.value)
    assert "2 unusable utterances (unreadable 2)" in message
    assert "en.jsonl:3: " in message and "en.jsonl:6: " in message


@pytest.mark.parametrize("memory", [2**30, 0])
def test_training_goes_on_without_skipped_audio(damaged, tmp_path, monkeypatch, memory):
    monkeypatch.setattr(pipeline, "MEMORY_BYTES", memory)
    skipped = tmp_path / "run" / "skipped.jsonl"
    config = data_config(on_bad_audio="skip")
    batches = list(train(damaged, config, 9, batch_size=4, skipped_path=str(skipped)))
    index = np.concatenate([b["index"] for b in batches])
    lengths = np.concatenate([b["token_length"] for b in batches])
    assert set(index.tolist()) == {-1, 0, 1, 3, 4, 6, 7, 8, 9}
    assert not lengths[index < 0].any() and all(np.isfinite(b["mel"]).all() for b in batches)
    records = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert sorted((r["where"].rpartition(":")[2], r["kind"]) for r in records) == [
        ("3", "unreadable"),
        ("6", "unreadable"),
    ]


def test_audio_too_large_for_memory_is_refused_when_it_is_read(damaged, monkeypatch):
    monkeypatch.setattr(pipeline, "MEMORY_BYTES", 0)
    with pytest.raises(ValueError, match=r"en.jsonl:\d: .*cannot be read as audio"):
        list(train(damaged, data_config(), 5, batch_size=4))


def test_token_limit(corpus, tmp_path):
    lengths = np.array([len(u.text) for u in corpus])
    with pytest.raises(ValueError, match=f"too_many_tokens {(lengths > 4).sum()}"):
        train(corpus, data_config(max_tokens=4), 1)
    config = data_config(max_tokens=4, on_bad_audio="skip")
    batches = list(train(corpus, config, 5, skipped_path=str(tmp_path / "skipped.jsonl")))
    index = np.concatenate([b["index"] for b in batches])
    assert set(index.tolist()) == set(np.flatnonzero(lengths <= 4).tolist())
    assert max(b["tokens"].shape[1] for b in batches) == 4


def test_wrong_arguments(corpus):
    with pytest.raises(ValueError, match="batch_size=8 does not divide among 3 hosts"):
        train(corpus, data_config(), 1, host_count=3)
    with pytest.raises(ValueError, match="no utterances"):
        train([], data_config(), 1)


# ---- augmentation --------------------------------------------------------------------------------


def test_speed_changes_length_and_pitch():
    time = np.arange(16000) / RATE
    audio = np.sin(2 * np.pi * 400 * time).astype(np.float32)
    faster = augment.change_speed(audio, 1.25)
    assert faster.dtype == np.float32 and len(faster) == 12800
    peak = np.abs(np.fft.rfft(faster)).argmax() * RATE / len(faster)
    assert peak == pytest.approx(500, abs=2)
    assert augment.change_speed(audio, 1.0) is audio


def test_noise_comes_at_the_asked_ratio():
    rng = np.random.default_rng(0)
    audio, noise = rng.standard_normal((2, 8000)).astype(np.float32) * [[0.1], [3.0]]
    noisy = augment.add_noise(audio, noise, snr=7.0)
    ratio = np.square(audio).mean() / np.square(noisy - audio).mean()
    assert 10 * np.log10(ratio) == pytest.approx(7.0, abs=1e-3)
    assert augment.add_noise(audio, np.zeros(8000), snr=7.0) is audio


def test_a_room_keeps_onset_length_and_power():
    audio = np.zeros(4000, np.float32)
    audio[1000] = 1.0
    impulse = np.concatenate([np.zeros(50), [1.0], 0.3 * 0.99 ** np.arange(500)])
    wet = augment.reverberate(audio, impulse)
    assert len(wet) == 4000 and np.abs(wet).argmax() == 1000
    assert np.square(wet).sum() == pytest.approx(1.0, rel=1e-4)
    assert np.abs(wet[1200]) > 0 and np.abs(wet[:1000]).max() < 1e-6


def test_spec_augment_masks_spans_within_each_utterance():
    config = data_config(
        **{"augment.time_masks": 2, "augment.time_width": 30, "augment.freq_masks": 1}
    ).augment
    mel = np.random.default_rng(0).standard_normal((16, 100, 80)).astype(np.float32)
    length = np.full(16, 100, np.int32)
    length[0] = 40
    mel[0, 40:] = np.nan
    masked = jax.jit(lambda key: augment.spec_augment(key, mel, length, config))
    first, same, other = (np.asarray(masked(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other, equal_nan=True)
    np.testing.assert_array_equal(first[0, 40:], mel[0, 40:])
    changed = np.where(np.isnan(mel), False, first != mel)
    means = [mel[i, :n].mean() for i, n in enumerate(length)]
    for i in range(16):
        np.testing.assert_allclose(first[i][changed[i]], means[i], rtol=1e-4, atol=1e-5)
        frames, bins = changed[i].all(axis=1).sum(), changed[i, : length[i]].all(axis=0).sum()
        assert frames <= 2 * (length[i] // 5) and bins <= 20
    assert changed.all(axis=2).sum() > 50 and changed[1:].all(axis=1).sum() > 20
    off = data_config().augment
    unmasked = jax.jit(lambda key: augment.spec_augment(key, mel, length, off))(jax.random.key(0))
    np.testing.assert_array_equal(unmasked, mel)
