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

import jax
import numpy as np
import pytest
from etils import epath
from toy_run import metrics_of, serve_buckets, tone_config, write_recipe

from otreg_jax import build, checkpoint, cluster, rundir, sharding, tracking
from otreg_jax import config as config_lib
from otreg_jax import train as train_lib
from otreg_jax.data import sources, tokenization

ROOT = pathlib.Path(__file__).parent.parent


def test_metrics_hold_what_is_promised(uninterrupted):
    assert list(uninterrupted) == list(range(1, 13))
    promised = {"step", "loss", "ce", "otreg", "marginal_error", "grad_norm", "learning_rate"}
    assert promised <= uninterrupted[12].keys()
    assert uninterrupted[2]["otreg_weight"] == 0 and uninterrupted[12]["otreg_weight"] == 1
    assert uninterrupted[12]["ce"] < uninterrupted[1]["ce"]


def test_warm_steps_compile_nothing_take_nothing_from_the_host_and_are_read_late(
    manifest, tmp_path, monkeypatch, caplog
):
    make_step, read_metrics = train_lib.step_lib.make_step, train_lib.read_metrics
    dispatched, read_after, compilations_of_warm = [], [], []

    def make_guarded_step(*args):
        step_fn = make_step(*args)

        def guarded_step(state, frozen, batch):
            shape = batch["tokens"].shape
            count = caplog.text.count("Finished XLA compilation")
            with jax.transfer_guard("disallow"):
                result = step_fn(state, frozen, batch)
            if shape in dispatched:
                compilations_of_warm.append(caplog.text.count("Finished XLA compilation") - count)
            dispatched.append(shape)
            return result

        return guarded_step

    def read(step, *args):
        read_after.append((step, len(dispatched)))
        read_metrics(step, *args)

    monkeypatch.setattr(train_lib.step_lib, "make_step", make_guarded_step)
    monkeypatch.setattr(train_lib.flops, "of_batches", lambda *_: lambda _: 0)
    monkeypatch.setattr(train_lib, "read_metrics", read)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train_lib.train(tone_config(manifest), tmp_path)
    assert "Finished XLA compilation" in caplog.text
    assert compilations_of_warm == [0] * (12 - len(set(dispatched)))
    # After the next step was dispatched; before a save (every 4 steps), which waits for its step.
    assert read_after == [(step, step + (step % 4 > 0)) for step in range(1, 13)]


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


def test_a_run_that_resumes_inside_its_profile_window_traces_the_rest(
    manifest, tmp_path, uninterrupted, finished
):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints" / "12")
    train_lib.train(tone_config(manifest, profile="6:10"), workdir)
    assert metrics_of(workdir) == uninterrupted
    assert list((workdir / "profile").rglob("*.xplane.pb"))


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


def test_the_best_checkpoint_outlives_newer_ones_and_restarts(manifest, tmp_path, monkeypatch):
    """Checkpoint 4 has the lowest dev loss of 2, 4, 6, 8; one more is kept, and a restart knows."""
    bad = manifest.with_name("dev.jsonl")
    unreadable = {"audio_filepath": "dev.txt", "text": "do", "duration": 0.3}
    bad.with_name("dev.txt").write_text("not audio")
    bad.write_text(manifest.read_text() + json.dumps(unreadable) + "\n")
    changes = dict(data__dev=str(bad), eval_every=2, checkpoint_every=2, keep_checkpoints=1)
    changes |= dict(data__num_buckets=1)
    measured, losses = [], iter([3.0, 1.0, 2.0])

    def dev_loss(*args):
        measured.append(real(*args))
        return next(losses, 1.5)

    real = train_lib.dev_loss
    monkeypatch.setattr(train_lib, "dev_loss", dev_loss)
    kept = lambda: {p.name for p in (tmp_path / "checkpoints").iterdir()}
    train_lib.train(tone_config(manifest, num_steps=6, **changes), tmp_path)
    assert kept() == {"4", "6"}
    train_lib.train(tone_config(manifest, num_steps=8, **changes), tmp_path)
    assert kept() == {"4", "8"}
    assert measured[-1] < measured[0]  # they are real losses, whatever the test made of them
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["dev_ce"] for line in lines if "dev_ce" in line] == [3.0, 1.0, 2.0, 1.5]
    runs = {which: build.load_run(tmp_path, which) for which in ("newest", "best", "4")}
    assert {which: run.step for which, run in runs.items()} == {"newest": 8, "best": 4, "4": 4}
    bias = lambda run: run.params["adapter"]["out"]["bias"]
    assert (bias(runs["best"]) == bias(runs["4"])).all()
    assert (bias(runs["best"]) != bias(runs["newest"])).any()
    with pytest.raises(ValueError, match="no checkpoint '6': choose newest, best or .* steps 4, 8"):
        build.load_run(tmp_path, "6")


def test_evaluation_takes_the_average_of_the_weights(manifest, tmp_path, monkeypatch):
    given, real = [], train_lib.dev_loss

    def dev_loss(eval_fn, params, *args):
        given.append(jax.tree.map(np.array, params))
        return real(eval_fn, params, *args)

    monkeypatch.setattr(train_lib, "dev_loss", dev_loss)
    changes = dict(optim__ema_decay=0.9, data__dev=str(manifest), eval_every=4, num_steps=4)
    changes |= dict(checkpoint_every=4, data__num_buckets=1)
    state = train_lib.train(tone_config(manifest, **changes), tmp_path)
    run = build.load_run(tmp_path)
    loaded = run.params
    assert run.longest_seconds == 0.75  # five tones
    bias = lambda params: np.array(params["adapter"]["out"]["bias"])
    np.testing.assert_array_equal(bias(given[0]), bias(loaded))
    assert np.abs(bias(loaded) - bias(state.params)).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_fingerprints_tell_weights_apart_and_not_how_they_are_split(dtype):
    x = np.random.default_rng(0).integers(-9, 9, (64, 32)).astype(dtype)
    swapped, one = x.copy(), x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    one[5, 7] += 1
    variants = {
        "x": x,
        "doubled": x + x,
        "negated": -x,
        "reversed": x[::-1],
        "swapped": swapped,
        "one": one,
        "reshaped": x.reshape(32, 64),
    }
    found = checkpoint.fingerprints(variants)
    assert len(set(found.values())) == len(variants)
    split = jax.device_put(x, sharding.batch_sharding(sharding.data_mesh()))
    assert checkpoint.fingerprints({"x": split})["x"] == found["x"]


def test_goodput_goes_on_over_restarts(manifest, tmp_path, capsys):
    train_lib.train(tone_config(manifest, num_steps=8), tmp_path)
    last = lambda: json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    first = last()
    time.sleep(1)
    train_lib.train(tone_config(manifest), tmp_path)
    assert "num_steps: 8 -> 12: from step 8 on the learning rate" in capsys.readouterr().out
    second = last()
    assert second["elapsed"] >= first["elapsed"] + 1
    assert second["time"] - second["elapsed"] == pytest.approx(first["time"] - first["elapsed"])
    productive = [line["goodput"] * line["elapsed"] for line in (first, second)]
    assert 0 < productive[0] < productive[1] < second["elapsed"] - 1


def test_kill_9_and_resume_continue_to_the_bit(manifest, tmp_path, uninterrupted):
    """A real process, killed while it saves or trains."""
    recipe = write_recipe(tmp_path, tone_config(manifest))
    workdir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "otreg_jax.train",
        f"--config={recipe}",
        f"--workdir={workdir}",
        "--config.mesh.data=-1",
    ]
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
    to_global, fed = sharding.to_global, []

    def broken(batch, mesh):
        fed.append({int(i) for i in batch["index"]})  # an epoch's last batch repeats some
        return to_global(batch | {"mel": batch["mel"] + np.nan}, mesh)

    monkeypatch.setattr(sharding, "to_global", broken)
    with pytest.raises(FloatingPointError, match="3 steps in a row.*learning_rate"):
        train_lib.train(tone_config(manifest, max_bad_steps=3), tmp_path)
    skipped = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
        if "skipped" in line
    ]
    assert len(skipped) == 3
    for line, indices in zip(skipped, fed, strict=False):
        assert sorted(line["skipped"]) == sorted(f"{i}.wav" for i in indices)


def test_a_workdir_of_another_configuration_is_refused(manifest, tmp_path, finished):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    train_lib.train(tone_config(manifest, log_every=5, keep_checkpoints=3), workdir)  # may change
    with pytest.raises(ValueError) as error:
        train_lib.train(tone_config(manifest, encoder__embed_dim=32, seed=1), workdir)
    assert "encoder.embed_dim: 16 -> 32" in str(error.value)
    assert "seed: 0 -> 1" in str(error.value)


def test_weights_that_are_not_the_checkpoints_are_named(manifest, tmp_path):
    """A frozen LLM whose files have changed, and a tokenizer likewise."""
    changes = dict(freeze="^llm/", llm__pretrain__num_steps=2, num_steps=4, data__num_buckets=1)
    config = tone_config(manifest, **changes)
    train_lib.train(config, tmp_path)
    weights = tmp_path / "llm" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # the last bits of one number
    before, content = weights.read_bytes(), bytes(content)
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="(?s)checkpoints/4.*frozen llm/.*: float32") as error:
        train_lib.train(config, tmp_path)
    assert str(error.value).count("frozen llm/") == 1
    weights.write_bytes(before)
    assert int(train_lib.train(config, tmp_path).step) == 4


def test_unusable_data_is_one_clear_message(manifest, tmp_path):
    with pytest.raises(ValueError, match="data.train='nowhere.jsonl': no such manifest"):
        train_lib.train(tone_config("nowhere.jsonl"), tmp_path)
    with pytest.raises(ValueError, match="no utterance is left"):
        train_lib.train(tone_config(manifest, data__max_duration=0.01), tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"audio_filepath": "0.wav"}\nnot json\n')
    with pytest.raises(ValueError, match="(?s)bad.jsonl:1.*text.*bad.jsonl:2.*JSON"):
        train_lib.train(tone_config(bad), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mesh__tensor=3), "data=2, fsdp=1, tensor=3 needs 6 devices, 8 are there"),
        (dict(batch_size=6), "batch_size=6 does not divide over 8 devices.*multiple of 8"),
        (dict(eval_every=2), "eval_every=2: it needs a dev set"),
        (dict(profile="9:3"), "profile='9:3', num_steps=12: it must be START:STOP"),
    ],
)
def test_impossible_settings_end_before_anything_is_made(manifest, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_lib.train(tone_config(manifest, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_remote_workdir_gets_every_file(manifest):
    """Everything except the arrays of checkpoints, on a bucket in memory."""
    serve_buckets()
    workdir = epath.Path("gs://bucket/run")
    config = tone_config(manifest, otreg__weight=2.0)
    config_lib.save(config, workdir / "config.json")
    assert config_lib.load(workdir / "config.json").to_dict() == config.to_dict()
    files = rundir.of(workdir)
    tokenizer = train_lib.make_tokenizer(config, files, sources.read_manifest(manifest))
    assert tokenization.load_tokenizer(workdir).fingerprint == tokenizer.fingerprint
    problem = sources.Problem("kind", "a:1", "why")
    for _ in range(2):
        sources.record_skipped([problem], str(workdir / "skipped.jsonl"))
    assert len((workdir / "skipped.jsonl").read_text().splitlines()) == 2
    for start, steps in ((0, (1, 2, 3)), (2, (3,))):  # a restart drops the line after step 2
        writer = tracking.MetricsWriter(files, start, 1, lambda step: 0.0, cluster.Watch(), 1)
        for step in steps:
            writer.evaluated(step, {"dev_ce": 1.0 / step})
        writer.close()
    assert [line["step"] for line in tracking.read(files)] == [1, 2, 3]
    names = {path.name for path in workdir.iterdir()}
    assert any(name.startswith("events.out.tfevents.") for name in names)
    assert {name for name in names if not name.startswith("events.")} == {
        "config.json",
        "tokenizer.model",
        "skipped.jsonl",
        "metrics.jsonl",
    }
    config.llm.pretrain.num_steps = 1
    with pytest.raises(ValueError, match="(?s)gs://bucket/run is remote.*llm.path"):
        train_lib.train(config, workdir)
