"""metrics.jsonl and TensorBoard's events: complete whatever happens, and readable by others."""

import contextlib
import functools
import os
import struct
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from toy import toy_batch, toy_config, toy_slm
from toy_run import metrics_of, tone_config

from benchmarks import structure
from otreg_jax import allowed, cluster, losses, metric_names, preflight, rundir, tracking, writers
from otreg_jax import train as train_lib


def events_of(path) -> list[Event]:
    """The events of a TFRecord file, every checksum verified."""
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        content = data[12 : 12 + length]
        for part, at in ((data[:8], 8), (content, 12 + length)):
            assert struct.unpack("<I", data[at : at + 4])[0] == masked_crc32c(part)
        events.append(Event.FromString(content))
        data = data[16 + length :]
    return events


def masked_crc32c(data: bytes) -> int:
    """RFC 3720's CRC-32C bit by bit, masked as TFRecord files have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def writer_of(workdir, start=0, log_every=1, **options):
    files, rate = rundir.of(workdir), lambda step: 0.5
    return tracking.MetricsWriter(files, start, log_every, rate, cluster.Watch(), 1, **options)


def test_a_value_that_is_not_finite_is_null_and_old_lines_are_read(tmp_path):
    writer = writer_of(tmp_path)
    writer.evaluated(1, {"dev_ce": float("nan")})
    writer.evaluated(2, {"dev_ce": 1.5})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "dev_ce": null}\n{"step": 2, "dev_ce": 1.5}\n'
    (tmp_path / "metrics.jsonl").write_text(text.replace("null", "NaN"))
    writer_of(tmp_path, start=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "dev_ce": null}\n'


def test_events_are_tensorboard_s_and_a_restart_hides_what_came_after(tmp_path):
    writer = writer_of(tmp_path, start=4)
    writer.evaluated(5, {"dev_ce": 1.25, "ids": ["a"]})
    writer.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    version, restart, values = events_of(path)
    assert version.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (5, SessionLog.START)
    assert [(v.tag, v.simple_value) for v in values.summary.value] == [("dev_ce", 1.25)]
    assert values.step == 5 and values.wall_time > 1.7e9


class Service(ModuleType):
    """What stands for a tracking service's library: it remembers its calls, and fails when told."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.broken = [], False
        self.run = SimpleNamespace(
            define_metric=self.call("define_metric"),
            log=self.call("log"),
            finish=self.call("finish"),
            info=SimpleNamespace(run_id="given-id"),
        )

    def call(self, name):
        def called(*args, **kwargs):
            if self.broken:
                raise RuntimeError("no answer")
            self.calls.append((name, args, kwargs))
            return self.run

        return called

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.call(name)


@pytest.fixture
def service(request, monkeypatch):
    library = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, library)
    return library


@pytest.mark.parametrize("service", ["wandb", "mlflow"], indirect=True)
def test_a_service_gets_what_metrics_jsonl_gets_and_a_restart_goes_on_there(service, tmp_path):
    options = {"log_to": service.__name__, "settings": {"otreg.weight": 1.0}}
    writer = writer_of(tmp_path, **options)
    writer.evaluated(1, {"dev_ce": 1.5})
    writer.skipped(2, {"loss": 2.0}, ["an-id"])
    writer.close()
    names = [name for name, _, _ in service.calls]
    sent = [call for call in service.calls if call[0] in ("log", "log_metrics")]
    if service.__name__ == "wandb":
        assert [args for _, args, _ in sent] == [
            ({"step": 1, "dev_ce": 1.5},),
            ({"step": 2, "loss": 2.0},),
        ]
        assert service.calls[0][2]["config"] == {"otreg.weight": 1.0} and names[-1] == "finish"
    else:
        assert [(args, kwargs["step"]) for _, args, kwargs in sent] == [
            (({"dev_ce": 1.5},), 1),
            (({"loss": 2.0},), 2),
        ]
        assert "log_params" in names and names[-1] == "end_run"
    first = (tmp_path / f"{service.__name__}-run.txt").read_text().strip()
    service.calls.clear()
    writer_of(tmp_path, start=1, **options).close()
    started = next(kwargs for name, _, kwargs in service.calls if name in ("init", "start_run"))
    assert first in started.values() and "log_params" not in [name for name, _, _ in service.calls]


@pytest.mark.parametrize("service", ["wandb", "mlflow"], indirect=True)
def test_a_service_that_does_not_answer_is_one_warning(service, tmp_path, caplog):
    service.broken = True
    writer = writer_of(tmp_path, log_to=f"tensorboard,{service.__name__}")
    for step in (1, 2, 3):
        writer.evaluated(step, {"dev_ce": 1.5})
    writer.close()
    assert caplog.text.count(f"{service.__name__} does not work (no answer)") == 1
    assert [line["step"] for line in tracking.read(rundir.of(tmp_path))] == [1, 2, 3]


def test_writers_can_be_chosen_and_one_that_is_not_installed_is_named(tmp_path, monkeypatch):
    assert all(allowed.WRITERS.accepts(name) for name in (*writers.OTHERS, "", "mlflow, wandb"))
    writer_of(tmp_path, log_to="").close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    config = tone_config("")
    config.log_to = "tensorboard,wandb"
    (line,) = [x for x in preflight.missing_files(config) if x.startswith("log_to")]
    assert line == """log_to='wandb': not installed: pip install "otreg_jax[wandb]\""""


def test_every_metric_has_its_unit_and_meaning(finished):
    seen = set().union(*tracking.read(rundir.of(finished)))
    assert {"otreg", "grad_norm", "steps_per_sec"} <= seen <= metric_names.TABLE.keys()
    page = (structure.ROOT / "docs/metrics.md").read_text()
    assert page == metric_names.as_markdown() + "\n", (
        "run python -m otreg_jax.metric_names > docs/metrics.md"
    )


def test_every_loss_has_its_unit_and_meaning():
    """All of them at once; only traced, nothing is compiled."""
    weights = {f"{name}__weight": 1.0 for name in ("ce", "otreg", "ctc", "infonce", "kl")}
    config, (slm, params) = toy_config(**weights), toy_slm(ctc=True)
    loss_fn = functools.partial(losses.loss_fn, config=config)
    schedules = losses.make_schedules(config)
    _, metrics = jax.eval_shape(
        lambda: loss_fn(slm, params, toy_batch(), jnp.int32(0), schedules=schedules)
    )
    assert {"ce", "otreg", "ctc", "infonce", "kl"} <= metrics.keys() <= metric_names.TABLE.keys()


def test_a_full_disk_neither_stops_nor_hangs_a_run(
    manifest, tmp_path, uninterrupted, monkeypatch, caplog
):
    append, seen = rundir._append, []

    def full_for_a_while(path, data):
        seen.append(path.name)
        if 3 <= seen.count(path.name) < 9:
            raise OSError(28, "No space left on device")
        append(path, data)

    monkeypatch.setattr(rundir, "_append", full_for_a_while)
    train_lib.train(tone_config(manifest), tmp_path)
    assert caplog.text.count("No space left on device") == 2  # one warning a file
    assert metrics_of(tmp_path) == uninterrupted
    (path,) = tmp_path.glob("events.out.tfevents.*")
    assert [event.step for event in events_of(path)] == [0, 1, *range(1, 13)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here is always full")
def test_a_log_on_a_full_disk_is_lost_and_nothing_else(
    manifest, tmp_path, uninterrupted, monkeypatch
):
    full = open("/dev/full", "w", buffering=1)
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", full)
    with pytest.raises(OSError):
        print("without the mend")
    with tracking.log_may_be_lost():
        train_lib.train(tone_config(manifest), tmp_path)
    with contextlib.suppress(OSError):
        full.close()
    assert metrics_of(tmp_path) == uninterrupted


def test_no_line_of_a_saved_step_is_lost(manifest, tmp_path, uninterrupted, monkeypatch):
    """The run dies as soon as its checkpoint is there."""
    save = train_lib.checkpoint.Checkpoints.save

    def save_and_die(*args):
        save(*args)
        raise SystemError("power cut")

    monkeypatch.setattr(train_lib.checkpoint.Checkpoints, "save", save_and_die)
    with pytest.raises(SystemError, match="power cut"):
        train_lib.train(tone_config(manifest), tmp_path)
    monkeypatch.undo()
    assert metrics_of(tmp_path) == {step: uninterrupted[step] for step in range(1, 5)}
    train_lib.train(tone_config(manifest), tmp_path)
    assert metrics_of(tmp_path) == uninterrupted


def test_a_run_resumed_within_its_profile_window_traces_the_rest(tmp_path):
    for folder, steps in (("stopped", (0, 1)), ("resumed", (2, 3, 4)), ("after", (4, 5))):
        profiler = tracking.Profiler(rundir.of(tmp_path / folder).profile, 1, 4)
        for step in steps:
            profiler.before(step)
            profiler.after(step, jnp.zeros(3) + step)
        profiler.close()
        traces = list((tmp_path / folder / "profile").rglob("*.xplane.pb"))
        assert len(traces) == (folder != "after")
