"""Where the metrics of a run go: metrics.jsonl always, and what the setting `log_to` names.

A writer has four functions of a line of metrics, a dict with its `step`; anything that has them can
stand in the list that `tracking.MetricsWriter` is given. None of them stops a run: a full disk or a
service that does not answer is one warning, see `rundir.Appended` and `_Service`.
"""

import importlib
import logging
import os
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from otreg_jax import rundir

PROJECT = "otreg_jax"  # of Weights & Biases, experiment of MLflow, where the environment names none


class Writer(Protocol):
    """Takes the lines of a run, on process 0."""

    def add(self, line: dict[str, Any]) -> None:
        """Takes a line: `step`, and values of which some are no numbers (ids that were skipped)."""

    def publish(self) -> None:
        """Writes what is not written yet. Called before each checkpoint."""

    def close(self) -> None:
        """The run ends."""


def open_all(
    names: str, files: rundir.Files, start: int, kept: Sequence[dict], settings: dict[str, Any]
) -> list[Writer]:
    """The writers of a run.

    Args:
      names: "tensorboard,wandb": what stands beside metrics.jsonl.
      start: the step the run begins after. kept: the lines up to there.
      settings: the run's settings, flat, for services that show them.
    """
    writers: list[Writer] = [JsonLines(files, kept)]
    for name in filter(None, (name.strip() for name in names.split(","))):
        writers.append(OTHERS[name](files, start, settings))
    return writers


class JsonLines:
    """metrics.jsonl: what resumed runs and reports read."""

    def __init__(self, files: rundir.Files, kept: Sequence[dict]):
        self.file = rundir.Appended(files.metrics, b"".join(map(_json_line, kept)))
        self.publish = self.close = self.file.publish

    def add(self, line: dict) -> None:
        self.file.add(_json_line(line))


class TensorBoard:
    """Events that TensorBoard reads; in a bucket they are written with each checkpoint.

    tensorboardX's own writer has a thread behind a queue; an error of the disk ends the thread, and
    the run waits for ever for a place in the queue.
    """

    def __init__(self, files: rundir.Files, start: int, settings: dict):
        now = time.time()
        first = Event(wall_time=now, file_version="brain.Event:2")
        restart = Event(wall_time=now, step=start + 1)  # TensorBoard drops what is after it
        restart.session_log.status = SessionLog.START
        self.file = rundir.Appended(files.events(now), _record(first) + _record(restart))
        self.publish = self.close = self.file.publish

    def add(self, line: dict) -> None:
        event = Event(wall_time=time.time(), step=line["step"])
        for key, value in numbers(line).items():
            event.summary.value.append(Summary.Value(tag=key, simple_value=value))
        self.file.add(_record(event))


class _Service:
    """A tracking service: what fails is one warning and goes on; nothing waits for an answer.

    A run goes on under the name it was given when it first started: WORKDIR/NAME-run.txt.
    """

    name = ""  # of its module

    def __init__(self, files: rundir.Files, start: int, settings: dict):
        self.failed, self.id_file = False, files.root / f"{self.name}-run.txt"
        self.library = importlib.import_module(self.name)
        self._try(self.start, str(files.root), settings)

    def start(self, title: str, settings: dict) -> None: ...
    def send(self, step: int, values: dict[str, float]) -> None: ...
    def end(self) -> None: ...

    def add(self, line: dict) -> None:
        self._try(self.send, line["step"], numbers(line))

    def publish(self) -> None: ...

    def close(self) -> None:
        self._try(self.end)

    def known_id(self) -> str | None:
        return self.id_file.read_text().strip() if self.id_file.exists() else None

    def keep_id(self, value: str) -> None:
        rundir.write_text(self.id_file, value + "\n")

    def _try(self, call: Callable, *arguments) -> None:
        try:
            call(*arguments)
        except Exception as error:  # services raise errors of many libraries
            if not self.failed:
                logging.warning("%s does not work (%s): the run goes on", self.name, error)
            self.failed = True


class WandB(_Service):
    """Weights & Biases. Its own variables say where and who: WANDB_PROJECT, WANDB_MODE, …"""

    name = "wandb"

    def start(self, title: str, settings: dict) -> None:
        known = self.known_id() or uuid.uuid4().hex
        self.keep_id(known)
        self.run = self.library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=known,
            name=title,
            config=settings,
            resume="allow",
        )
        # The service's own counter only rises; a resumed run goes back to its checkpoint.
        self.run.define_metric("*", step_metric="step")

    def send(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def end(self) -> None:
        self.run.finish()


class MLflow(_Service):
    """MLflow. Its own variables say where: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, …"""

    name = "mlflow"

    def start(self, title: str, settings: dict) -> None:
        known = self.known_id()
        if known is None and "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            self.library.set_experiment(PROJECT)
        run = self.library.start_run(run_id=known, run_name=None if known else title)
        self.keep_id(run.info.run_id)
        if known is None:
            self.library.log_params({key: str(value)[:500] for key, value in settings.items()})

    def send(self, step: int, values: dict[str, float]) -> None:
        self.library.log_metrics(values, step=step, synchronous=False)

    def end(self) -> None:
        self.library.flush_async_logging()
        self.library.end_run()


OTHERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """The metrics of a line: what is a number and not its step."""
    return {key: value for key, value in line.items() if isinstance(value, float)}


def _json_line(line: dict) -> bytes:
    return (rundir.dumps(line) + "\n").encode()


def _record(event: Event) -> bytes:
    """An event as TensorBoard's files hold it: length, content and their checksums."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksum = lambda part: struct.pack("<I", masked_crc32c(part))
    return length + checksum(length) + data + checksum(data)
