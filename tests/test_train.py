"""The training loop on real audio files: resume to the bit, preemption, messages."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile

from otreg_jax import config as config_lib
from otreg_jax import sharding
from otreg_jax import train as train_lib

ROOT = pathlib.Path(__file__).parent.parent
WORDS = ("do", "re", "mi", "fa", "sol")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Twelve utterances: each word is a tone."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(12):
        words = rng.integers(len(WORDS), size=2 + i % 4)
        tones = [np.sin(2 * np.pi * (300 + 150 * w) * np.arange(2400) / 16000) for w in words]
        audio = np.concatenate(tones) + 0.01 * rng.normal(size=2400 * len(words))
        soundfile.write(folder / f"{i}.wav", 0.3 * audio, 16000)
        text = " ".join(WORDS[w] for w in words)
        duration = len(audio) / 16000
        lines.append({"audio_filepath": f"{i}.wav", "text": text, "duration": duration})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tone_config(manifest, **changes):
    config = config_lib.default()
    config.data.train = str(manifest)
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = 12, 8, 1, 4
    config.data.num_mels = 16
    config.tokenizer.model_type = "word"
    config.encoder.update(
        {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "strides": (2, 2)}
    )
    config.encoder.max_positions = 64
    config.adapter.hidden_dim = 16
    config.llm.update({"embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8})
    config.llm.mlp_dim = 32
    config.otreg.weight, config.otreg.start_step, config.otreg.ramp_steps = 1.0, 2, 4
    config.optim.warmup_steps = 2
    config.data.augment.freq_masks = 1
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def metrics_of(workdir):
    """{step: line without what depends on the clock}"""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: {k: v for k, v in line.items() if not k.endswith("per_sec")} for line in lines
    }


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory):
    """The work directory of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished")
    train_lib.train(tone_config(manifest), workdir)
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(finished):
    return metrics_of(finished)


def test_metrics_hold_what_is_promised(uninterrupted):
    assert list(uninterrupted) == list(range(1, 13))
    promised = {"step", "loss", "ce", "otreg", "marginal_error", "grad_norm", "learning_rate"}
    assert promised <= uninterrupted[12].keys()
    assert uninterrupted[2]["otreg_weight"] == 0 and uninterrupted[12]["otreg_weight"] == 1
    assert uninterrupted[12]["ce"] < uninterrupted[1]["ce"]


def test_a_crash_and_resume_continue_to_the_bit(manifest, tmp_path, uninterrupted, monkeypatch):
    read_metrics = train_lib.read_metrics

    def crash(step, *args):
        if step == 7:
            raise RuntimeError("power cut")
        read_metrics(step, *args)

    monkeypatch.setattr(train_lib, "read_metrics", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train_lib.train(tone_config(manifest), tmp_path)
    monkeypatch.undo()
    # What a killed save leaves behind must not be in the way.
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    train_lib.train(tone_config(manifest), tmp_path)
    assert metrics_of(tmp_path) == uninterrupted


def test_a_broken_newest_checkpoint_falls_back(manifest, tmp_path, finished, caplog):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    for path in (workdir / "checkpoints" / "12").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:100])
    train_lib.train(tone_config(manifest), workdir)
    assert "step 12 cannot be read" in caplog.text
    assert metrics_of(workdir) == metrics_of(finished)


def test_sigterm_saves_and_the_next_start_goes_on(manifest, tmp_path, uninterrupted):
    terminate = threading.Timer(0, os.kill, (os.getpid(), signal.SIGTERM))
    read_metrics = train_lib.read_metrics

    def terminate_at_5(step, *args):
        if step == 5:
            terminate.start()
            terminate.join()
        read_metrics(step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lib, "read_metrics", terminate_at_5)
        state = train_lib.train(tone_config(manifest), tmp_path)
    assert int(state.step) in (6, 7)
    state = train_lib.train(tone_config(manifest), tmp_path)
    assert int(state.step) == 12
    assert metrics_of(tmp_path) == uninterrupted


def test_kill_9_and_resume_continue_to_the_bit(manifest, tmp_path, uninterrupted):
    """A real process, killed while it saves or trains."""
    config = tone_config(manifest)
    config_lib.save(config, tmp_path / "recipe.json")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from otreg_jax import config\n"
        f"def get_config():\n    return config.load({str(tmp_path / 'recipe.json')!r})\n"
    )
    workdir = tmp_path / "run"
    command = [
        sys.executable, "-m", "otreg_jax.train", f"--config={recipe}", f"--workdir={workdir}",
        "--config.mesh.data=-1",
    ]  # fmt: skip
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    first = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if (workdir / "metrics.jsonl").exists() and len(metrics_of(workdir)) >= 5:
            break
        assert first.poll() is None
        time.sleep(0.1)
    first.kill()
    first.wait()
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    assert metrics_of(workdir) == uninterrupted


def test_non_finite_steps_name_their_utterances_and_end_the_run(manifest, tmp_path, monkeypatch):
    to_global = sharding.to_global
    broken = lambda batch, mesh: to_global(batch | {"mel": batch["mel"] + np.nan}, mesh)
    monkeypatch.setattr(sharding, "to_global", broken)
    with pytest.raises(FloatingPointError, match="3 steps in a row.*learning_rate"):
        train_lib.train(tone_config(manifest, max_bad_steps=3), tmp_path)
    skipped = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
        if "skipped" in line
    ]  # fmt: skip
    assert len(skipped) == 3 and len(skipped[0]["skipped"]) == 8
    assert all(name.endswith(".wav") for name in skipped[0]["skipped"])


def test_a_workdir_of_another_configuration_is_refused(manifest, tmp_path, finished):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    train_lib.train(tone_config(manifest, log_every=5, keep_checkpoints=3), workdir)  # may change
    with pytest.raises(ValueError) as error:
        train_lib.train(tone_config(manifest, encoder__embed_dim=32, seed=1), workdir)
    assert "encoder.embed_dim: 16 -> 32" in str(error.value)
    assert "seed: 0 -> 1" in str(error.value)


def test_unusable_data_is_one_clear_message(manifest, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        train_lib.train(tone_config("nowhere.jsonl"), tmp_path)
    with pytest.raises(ValueError, match="no utterance is left"):
        train_lib.train(tone_config(manifest, data__max_duration=0.01), tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"audio_filepath": "0.wav"}\nnot json\n')
    with pytest.raises(ValueError, match="(?s)bad.jsonl:1.*text.*bad.jsonl:2.*JSON"):
        train_lib.train(tone_config(bad), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
