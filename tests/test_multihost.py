"""Several real processes train one run: the same losses as one, on any number of devices; all of
them stop together; and when one dies or hangs, the others end and say so."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from toy_run import metrics_of, tone_config, write_recipe, write_tones

from otreg_jax import cluster
from otreg_jax import train as train_lib

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 240  # seconds; a busy machine needs most of them to start several processes
STALL_SECONDS = 30  # and five times as long until the first step


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A small run on twelve utterances, each with its own prompts for two tasks, and a thirteenth
    that is no audio."""
    manifest = write_tones(tmp_path_factory.mktemp("tones"))
    (manifest.parent / "bad.wav").write_text("not audio")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for i, line in enumerate(lines):
        line |= {"lang": ("de", "en")[i % 2], "context": line["text"].split()[:1]}
    lines.append({"audio_filepath": "bad.wav", "text": "do", "duration": 0.3, "task": "asr"})
    lines[-1]["lang"] = "de"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tone_config(
        manifest,
        num_steps=6,
        checkpoint_every=3,
        data__num_buckets=1,
        otreg__num_iters=10,
        data__on_bad_audio="skip",
        data__distractors=2,
    )
    with config.unlocked():
        config.tasks = {
            "transcribe": {"prompts": ("{language} {context}: {speech}", "{speech} {context}")},
            "identify": {"prompts": ("which? {speech}",)},
        }
    return config


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The work directory of a run in this one process, on eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    train_lib.train(config, workdir)
    return workdir


class Processes:
    """`python -m otreg_jax.train` as several processes of one run."""

    def __init__(self, folder, config, workdir, count: int, devices: int, *flags: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        recipe = write_recipe(folder, config)
        self.workdir, self.processes = workdir, []
        self.logs = [folder / f"{workdir.name}-{i}.log" for i in range(count)]
        for i, log in enumerate(self.logs):
            env = os.environ | {
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            }
            command = [
                sys.executable,
                "-m",
                "otreg_jax.train",
                f"--config={recipe}",
                f"--workdir={workdir}",
                *flags,
            ]
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_for_step(self, step: int) -> None:
        path = self.workdir / "metrics.jsonl"
        for _ in range(10 * PATIENCE):
            if path.exists() and any(s >= step for s in metrics_of(self.workdir)):
                return
            assert [p.poll() for p in self.processes] == [None] * len(self.processes), self.log(0)
            time.sleep(0.1)
        pytest.fail(f"step {step} does not come:\n{self.log(0)}")

    def wait(self, i: int, seconds: float = PATIENCE) -> int:
        return self.processes[i].wait(seconds)

    def log(self, i: int) -> str:
        return self.logs[i].read_text()


def checkpoints(workdir) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def assert_same_losses(lines, expected, steps) -> None:
    """Sums over another number of devices differ in their last bits."""
    assert set(steps) <= lines.keys() & expected.keys()
    for step in steps:
        for key in ("loss", "ce", "otreg", "grad_norm"):
            assert lines[step][key] == pytest.approx(expected[step][key], rel=2e-5), (step, key)


@pytest.mark.slow
def test_four_processes_train_as_one_and_one_goes_on(config, alone, tmp_path):
    workdir = tmp_path / "four"
    with Processes(tmp_path, config, workdir, 4, 1) as run:
        assert [run.wait(i) for i in range(4)] == [0] * 4, run.log(0)
    four = metrics_of(workdir)
    assert list(four) == list(range(1, 7))
    assert_same_losses(four, metrics_of(alone), range(1, 7))
    # All that is written once, is.
    written = {path.name for path in workdir.iterdir() if "tfevents" not in path.name}
    assert written == {
        "checkpoints",
        "config.json",
        "data.json",
        "metrics.jsonl",
        "skipped.jsonl",
        "tokenizer.model",
    }
    assert len(list(workdir.glob("*tfevents*"))) == 1
    assert len((workdir / "skipped.jsonl").read_text().splitlines()) == 1
    assert checkpoints(workdir) == {"3", "6"}
    # Four processes of one device wrote the checkpoint, one process of eight devices reads it.
    shutil.rmtree(workdir / "checkpoints" / "6")
    assert int(train_lib.train(config, workdir).step) == 6
    assert_same_losses(metrics_of(workdir), four, range(1, 7))
    # On as many devices as before it goes on to the bit.
    workdir = shutil.copytree(alone, tmp_path / "alone")
    shutil.rmtree(workdir / "checkpoints" / "6")
    train_lib.train(config, workdir)
    assert metrics_of(workdir) == metrics_of(alone)


@pytest.mark.slow
def test_two_processes_take_over_stop_together_and_notice_a_death(config, alone, tmp_path):
    workdir = shutil.copytree(alone, tmp_path / "two")
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / "metrics.jsonl").unlink()
    flags = "--config.num_steps=100000", "--config.checkpoint_every=100000"
    flags += (f"--config.stall_seconds={STALL_SECONDS}",)
    with Processes(tmp_path, config, workdir, 2, 2, *flags) as run:
        run.wait_for_step(6)
        run.processes[1].send_signal(signal.SIGTERM)
        assert [run.wait(i) for i in range(2)] == [cluster.RESTART] * 2, run.log(0)
    assert "resuming at step 3" in run.log(0)
    assert_same_losses(metrics_of(workdir), metrics_of(alone), [4])  # later ones: another schedule
    last = max(metrics_of(workdir))
    assert checkpoints(workdir) == {"3", str(last)}  # saved at the step that both agreed on

    with Processes(tmp_path, config, workdir, 2, 2, *flags) as run:
        run.wait_for_step(last + 3)
        run.processes[1].kill()
        # JAX ends the other by SIGABRT, once the heartbeats have stopped for STALL_SECONDS.
        assert run.wait(0) == -signal.SIGABRT
    assert f"resuming at step {last}" in run.log(0)
    assert "another task died" in run.log(0)


@pytest.mark.slow
def test_a_stopped_process_is_reported_by_the_other(config, alone, tmp_path):
    workdir = shutil.copytree(alone, tmp_path / "stopped")
    flags = "--config.num_steps=100000", f"--config.stall_seconds={STALL_SECONDS}"
    with Processes(tmp_path, config, workdir, 2, 2, *flags) as run:
        run.wait_for_step(10)
        run.processes[0].send_signal(signal.SIGSTOP)
        assert run.wait(1) in (-signal.SIGABRT, cluster.RESTART)
    assert "hangs: nothing after" in run.log(1) or "another task died" in run.log(1)


def test_a_run_in_which_nothing_happens_says_where_it_hangs_and_ends():
    program = (
        "import time\n"
        "from otreg_jax import cluster\n"
        "watch = cluster.Watch(2)\n"
        "def reading_a_disk_that_is_gone():\n    time.sleep(60)\n"
        "for step in range(3):\n    time.sleep(1)\n    watch.lap('step', step + 1)\n"
        "reading_a_disk_that_is_gone()\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == cluster.RESTART
    assert "process 0 of 1" in done.stderr and "nothing after 'step 3'" in done.stderr
    assert "reading_a_disk_that_is_gone" in done.stderr


def test_processes_of_one_tensor_parallel_group_feed_the_same_rows(monkeypatch):
    class Device:
        def __init__(self, index):
            self.process_index = index // 2  # two devices a process

    class Mesh:
        def __init__(self, data, fsdp, tensor):
            count = data * fsdp * tensor
            self.shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
            self.devices = np.array([Device(i) for i in range(count)]).reshape(data, fsdp, tensor)

    def shares(mesh):
        found = []
        for process in range(mesh.devices.size // 2):
            monkeypatch.setattr(cluster.jax, "process_index", lambda process=process: process)
            found.append(cluster.batch_share(mesh))
        return found

    assert shares(Mesh(8, 1, 1)) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares(Mesh(2, 2, 2)) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares(Mesh(2, 1, 4)) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(ValueError, match="do not split the batch into equal parts"):
        shares(Mesh(2, 1, 3))
