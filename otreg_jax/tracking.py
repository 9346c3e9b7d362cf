"""What a run says of itself while it trains: metrics, which `writers` write; profiles; its log."""

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from otreg_jax import config as config_lib
from otreg_jax import flops, rundir, writers
from otreg_jax.data import features


class MetricsWriter:
    """The metrics of a run, written by process 0; one line each `log_every` steps, every value the
    mean over these steps. Lines after the resumed step are dropped. Names: `metric_names`.

    Args:
      files: of the run. start: the step it begins after.
      learning_rate: a function of the step before the one logged.
      watch: has `times()`, added to each line.
      num_shares: how many processes feed different rows of a batch.
      log_to, settings: see `writers.open_all`.
    """

    def __init__(
        self,
        files: rundir.Files,
        start: int,
        log_every: int,
        learning_rate,
        watch,
        num_shares: int,
        log_to: str = "tensorboard",
        settings: dict[str, Any] | None = None,
    ):
        self.log_every, self.learning_rate = log_every, learning_rate
        self.watch, self.num_shares = watch, num_shares
        self.window, self.count = [], {"audio": 0.0, "tokens": 0, "flops": 0}
        chip = flops.chip(jax.devices()[0])
        self.peak_flops = chip.flops * jax.device_count() if chip else None
        self.time = None  # the first window starts after the first step: compilation is no speed
        self.writers = []
        if jax.process_index() == 0:
            kept = [line for line in read(files) if line["step"] <= start] if start else []
            self.writers = writers.open_all(log_to, files, start, kept, settings or {})

    def step(self, step: int, metrics: dict, batch, step_flops: int) -> dict | None:
        """Adds a step; returns the line if one was written."""
        self.window.append(metrics)
        self.count["audio"] += audio_seconds(batch) * self.num_shares
        self.count["tokens"] += int(batch["token_length"].sum()) * self.num_shares
        self.count["flops"] += step_flops
        if self.time is None:
            self.time, self.timed = time.perf_counter(), -len(self.window)
            self.count = dict.fromkeys(self.count, 0)
        if step % self.log_every:
            return None
        # Where a stage begins, some steps have no such metric.
        line = {key: float(np.mean([m[key] for m in self.window if key in m])) for key in metrics}
        line["learning_rate"] = float(self.learning_rate(step - 1))
        elapsed = time.perf_counter() - self.time
        steps = len(self.window) + self.timed
        if steps > 0:
            line["steps_per_sec"] = steps / elapsed
            line["audio_sec_per_sec"] = self.count["audio"] / elapsed
            line["tokens_per_sec"] = self.count["tokens"] / elapsed
            line["flops_per_sec"] = self.count["flops"] / elapsed
            if self.peak_flops:
                line["mfu"] = line["flops_per_sec"] / self.peak_flops
        self.window, self.timed = [], 0
        self.count = dict.fromkeys(self.count, 0)
        self.time = time.perf_counter()
        self._write({"step": step, **line, **self.watch.times()})
        return line

    def evaluated(self, step: int, metrics: dict) -> None:
        """Records an evaluation after `step`, in a line of its own."""
        self._write({"step": step, **metrics})

    def skipped(self, step: int, metrics: dict, ids: list[str]) -> None:
        """Records a skipped step at once."""
        self._write({"step": step, "skipped": ids, **metrics})

    def _write(self, line: dict) -> None:
        for writer in self.writers:
            writer.add(line)

    def publish(self) -> None:
        """Writes what is not written yet: to a remote workdir, or after the disk was full."""
        for writer in self.writers:
            writer.publish()

    def close(self) -> None:
        """Writes it too; nothing more comes."""
        for writer in self.writers:
            writer.close()


def writer_of(config, files: rundir.Files, start: int, learning_rate, watch, num_shares: int):
    """The `MetricsWriter` of a run."""
    settings = config_lib.flatten(config)
    return MetricsWriter(
        files,
        start,
        config.log_every,
        learning_rate,
        watch,
        num_shares,
        log_to=config.log_to,
        settings=settings,
    )


def read(files: rundir.Files) -> list[dict]:
    """The lines of metrics.jsonl; a value that was not finite is None (in old files NaN).

    Raises:
      ValueError: a line is damaged; names it.
    """
    return rundir.read_lines(files.metrics, "delete this line, or use another --workdir")


def time_before(files: rundir.Files, start: int) -> tuple[float, float | None]:
    """(seconds that led to the resumed step `start`, when the run first started) after what
    metrics.jsonl says; (0, None) for a new run."""
    lines = [line for line in read(files) if "elapsed" in line]
    productive = [line["goodput"] * line["elapsed"] for line in lines if line["step"] <= start]
    starts = [line["time"] - line["elapsed"] for line in lines]
    return max(productive, default=0.0), min(starts, default=None)


def audio_seconds(batch) -> float:
    """Seconds of audio in a host's batch, without its padding."""
    if "audio_length" in batch:
        return float(batch["audio_length"].sum()) / features.SAMPLE_RATE
    return float(batch["mel_length"].sum()) * features.HOP / features.SAMPLE_RATE


class OneStepLate:
    """Reads the metrics of a step when the next one is under way: they are ready then, and the
    device does not wait for the host."""

    def __init__(self, read):
        self.read_now, self.pending = read, None

    def add(self, *step) -> None:
        self.read()
        self.pending = step

    def read(self) -> None:
        """Reads what is pending, which waits for it."""
        pending, self.pending = self.pending, None
        if pending:
            self.read_now(*pending)


def phases():
    """A function of each batch in turn and its stage: how its step's time is accounted for
    (`cluster.Watch`)."""
    programs, compiled = set(), False

    def phase_of(stage: int, batch) -> str:
        nonlocal compiled
        program = (stage, *(x.shape for x in batch.values()))
        # The step after a compilation waits for that of the other processes.
        waited, compiled = compiled, program not in programs
        programs.add(program)
        return "compilation" if compiled or waited else "step"

    return phase_of


class Profiler:
    """Traces the steps from `start` to `stop` into a folder that TensorBoard and Perfetto open.

    A run that resumes between them traces what is left.
    """

    def __init__(self, folder, start: int, stop: int):
        self.folder, self.start, self.stop = folder, start, stop
        self.local = None  # where a trace under way is written to

    def before(self, step: int) -> None:
        if self.start <= step < self.stop and self.local is None:
            self.local = tempfile.mkdtemp() if rundir.is_remote(self.folder) else str(self.folder)
            jax.profiler.start_trace(self.local)

    def after(self, step: int, state) -> None:
        if step + 1 == self.stop and self.local is not None:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace under way."""
        if self.local is None:
            return
        jax.profiler.stop_trace()
        for path in Path(self.local).rglob("*") if rundir.is_remote(self.folder) else ():
            if path.is_file():
                rundir.write_bytes(self.folder / path.relative_to(self.local), path.read_bytes())
        self.local = None


@contextlib.contextmanager
def log_may_be_lost():
    """What is printed inside is lost where it cannot be written (a full disk, a closed terminal);
    nothing ends because of it."""
    out, err = _Lossy(sys.stdout), _Lossy(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class _Lossy:
    """A text stream whose writes may fail."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()
