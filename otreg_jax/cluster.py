"""One run as several processes, on machines that fail: joining, taking turns, noticing a hang."""

import atexit
import contextlib
import datetime
import faulthandler
import os
import re
import socket
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

RESTART = 75  # EX_TEMPFAIL: launchers start a run again that ends with it
HEARTBEAT_SECONDS = 100  # a process that gave no sign of life for so long is taken for dead
# What a step of this process raises when another process is gone: status codes of the runtime,
# without those that speak of the program itself (out of memory, say).
LOST = r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION):"


@contextlib.contextmanager
def membership(stall_seconds: int = 0):
    """Around the program of a process: joins its cluster, if there is one, and leaves it.

    Cloud TPU, SLURM and Kubernetes are recognised by jax. By hand, set JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. No device may have been used before.

    When a process dies or stops, jax ends all others with SIGABRT (status 134 of a shell) and says
    which one it was, within HEARTBEAT_SECONDS, or `stall_seconds` if that is shorter.
    """
    heartbeat = min(HEARTBEAT_SECONDS, stall_seconds or HEARTBEAT_SECONDS)
    _join(heartbeat)
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            # At exit jax would wait minutes for the other processes, which wait for this one. If
            # one of them is to blame, its heartbeats will tell: jax names it and ends this process.
            patience = 2 * heartbeat if re.match(LOST, str(error)) else 0
            atexit.register(_leave, patience)  # runs before what jax has registered
        raise


def _join(heartbeat: int) -> None:
    env = os.environ
    if "JAX_NUM_PROCESSES" in env:
        jax.distributed.initialize(
            env["JAX_COORDINATOR_ADDRESS"], int(env["JAX_NUM_PROCESSES"]),
            int(env["JAX_PROCESS_ID"]), heartbeat_timeout_seconds=heartbeat,
        )  # fmt: skip
    elif (
        int(env.get("SLURM_NTASKS", 1)) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or "JOB_COMPLETION_INDEX" in env
    ):
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
    if jax.process_count() > 1:
        # With Gloo the processes must meet within half a minute in the first collective of a set of
        # devices, and later need not: the first step's would wait for the slowest compilation.
        everywhere = NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), P("all"))
        ones = jax.jit(lambda: jnp.ones(jax.device_count()), out_shardings=everywhere)()
        jax.jit(jnp.sum)(ones).block_until_ready()
        multihost_utils.sync_global_devices("joined")


def _leave(patience: int) -> None:
    sys.stdout.flush()
    if patience:
        print(f"{_name()}: is another process gone? Waiting {patience} s to hear", file=sys.stderr)
        time.sleep(patience)
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def process_0_first():
    """Process 0 runs the block while the others wait; then they do, and find what it wrote."""
    if jax.process_index():
        multihost_utils.sync_global_devices("process 0 first")
    yield
    if not jax.process_index():
        multihost_utils.sync_global_devices("process 0 first")


def batch_share(mesh) -> tuple[int, int]:
    """(index, count): which of how many equal parts of a batch's rows this process feeds.

    Processes that share a tensor-parallel group feed the same rows.

    Raises:
      ValueError: processes overlap in a part of their rows only.
    """
    rows = {}
    for position, device in np.ndenumerate(mesh.devices):
        rows.setdefault(device.process_index, set()).add(position[:2])  # data, fsdp
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if len({len(part) for part in parts}) > 1 or len(set().union(*parts)) < sum(map(len, parts)):
        raise ValueError(
            f"mesh: the {len(rows)} processes of {dict(mesh.shape)} do not split the batch into "
            "equal parts; let mesh.tensor divide, or be a multiple of, the devices of a process"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


class Watch:
    """Where the time of a run goes; and the end of a run that hangs.

    Args:
      stall_seconds: if no lap comes for so long (five times as long before the first "step", for
        compilation) the process says so, shows where each of its threads stands, and ends with
        RESTART; 0: it never does.
      productive: seconds already spent in steps that count. start: when the run first started, a
        Unix time. Both are there to be continued after a restart.
    """

    def __init__(self, stall_seconds: int = 0, productive: float = 0.0, start: float | None = None):
        self.start, self.productive = start or time.time(), productive
        self.last, self.done = time.monotonic(), "start"
        self.stall_seconds, self.patience = stall_seconds, 5 * stall_seconds
        self.closed = threading.Event()
        if stall_seconds:
            threading.Thread(target=self._look, daemon=True).start()

    def lap(self, phase: str, step: int) -> None:
        """The time since the last lap was spent in `phase`; that of "step" is productive."""
        now = time.monotonic()
        if phase == "step":
            self.productive += now - self.last
            self.patience = self.stall_seconds
        self.last, self.done = now, f"{phase} {step}"

    def times(self) -> dict[str, float]:
        """Unix time, seconds since the run first started, and the productive fraction of them."""
        now = time.time()
        elapsed = max(now - self.start, 1e-9)
        return {"time": now, "elapsed": elapsed, "goodput": self.productive / elapsed}

    def close(self) -> None:
        self.closed.set()

    def _look(self) -> None:
        while not self.closed.wait(1.0):
            idle = time.monotonic() - self.last
            if idle > self.patience:
                since = datetime.datetime.now() - datetime.timedelta(seconds=idle)
                print(
                    f"\n{_name()} hangs: nothing after {self.done!r} at {since:%H:%M:%S}, for "
                    f"{idle:.0f} s (stall_seconds={self.stall_seconds}).\n"
                    "Below is where each thread stands. In a device computation: another process "
                    "is missing, see its log. In the data pipeline or a checkpoint: look at the "
                    "storage. In a compilation: raise stall_seconds.\n"
                    f"Ending with status {RESTART}; start the run again to go on.",
                    file=sys.stderr,
                )  # fmt: skip
                faulthandler.dump_traceback(sys.stderr)
                sys.stderr.flush()
                os._exit(RESTART)


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
