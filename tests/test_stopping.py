"""A run that is told to stop, or that meets an unreadable file, saves first."""

import os
import signal
import subprocess
import sys

import pytest
from toy_run import metrics_of, tone_config

from otreg_jax import rundir
from otreg_jax import train as train_lib
from otreg_jax.data import pipeline


@pytest.fixture(autouse=True)
def in_the_foreground():
    """What a shell starts in the background ignores Ctrl-C, also the tests: not here."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def at_step(monkeypatch):
    """Calls a function when the metrics of a step are read."""
    read_metrics = train_lib.read_metrics

    def at(when, act):
        def read(step, *args):
            if step == when:
                act()
            read_metrics(step, *args)

        monkeypatch.setattr(train_lib, "read_metrics", read)

    return at


def goes_on_to_the_bit(manifest, workdir, uninterrupted) -> None:
    assert rundir.checkpoint_steps(rundir.of(workdir))[-1] in (6, 7)
    assert int(train_lib.train(tone_config(manifest), workdir).step) == 12
    assert metrics_of(workdir) == uninterrupted


def test_a_closed_terminal_saves(manifest, tmp_path, uninterrupted, at_step, monkeypatch):
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGHUP))
    state = train_lib.train(tone_config(manifest), tmp_path)
    assert int(state.step) in (6, 7)
    monkeypatch.undo()
    goes_on_to_the_bit(manifest, tmp_path, uninterrupted)


def test_ctrl_c_saves(manifest, tmp_path, uninterrupted, at_step, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train_lib.train(tone_config(manifest), tmp_path)
    assert signal.getsignal(signal.SIGINT) == before
    monkeypatch.undo()
    goes_on_to_the_bit(manifest, tmp_path, uninterrupted)


def test_a_second_ctrl_c_ends_at_once_and_nohup_holds():
    program = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
from otreg_jax.stopping import StopSignals
signals = StopSignals()
os.kill(os.getpid(), signal.SIGHUP)
assert not signals.told_to_stop(0)
os.kill(os.getpid(), signal.SIGINT)
assert signals.told_to_stop(1)
print("still here", flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("too far")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "still here" in done.stdout and "too far" not in done.stdout
    assert "Ctrl-C again ends at once" in done.stderr


def test_an_unreadable_file_met_in_mid_run_saves(
    manifest, tmp_path, uninterrupted, at_step, monkeypatch
):
    """A file that is replaced while the run reads it again in each epoch of two steps."""
    monkeypatch.setattr(pipeline, "MEMORY_BYTES", 0)
    path = manifest.with_name("3.wav")
    content = path.read_bytes()
    at_step(1, lambda: path.write_bytes(b"not audio"))  # batches are read up to six steps ahead
    with pytest.raises(ValueError, match="train.jsonl:4"):
        train_lib.train(tone_config(manifest, checkpoint_every=12), tmp_path)
    path.write_bytes(content)
    monkeypatch.undo()
    (step,) = rundir.checkpoint_steps(rundir.of(tmp_path))
    assert 2 <= step < 12
    assert list(metrics_of(tmp_path)) == list(range(1, step + 1))
    train_lib.train(tone_config(manifest), tmp_path)
    assert metrics_of(tmp_path) == uninterrupted
