"""metrics.jsonl and TensorBoard's events: complete whatever happens, and readable by others."""

import struct

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from toy_run import metrics_of, tone_config

from otreg_jax import cluster, rundir, tracking
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


def writer_of(workdir, start=0, log_every=1):
    files = rundir.of(workdir)
    return tracking.MetricsWriter(files, start, log_every, lambda step: 0.5, cluster.Watch(), 1)


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
