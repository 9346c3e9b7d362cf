"""One run as several processes, on machines that fail: joining, agreeing, noticing a hang."""

import contextlib
import datetime
import faulthandler
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import clusters, distributed, hardware_utils
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

RESTART = 75  # EX_TEMPFAIL: launchers start a run again that ends with it
HEARTBEAT_SECONDS = 100  # a process that gave no sign of life for so long is taken for dead
JOIN_SECONDS = 300  # so long the processes of a run wait for each other at the start
BY_HAND = "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in each"
FOR_TPU = "install JAX for TPUs, OTREG_ACCELERATOR=tpu bash launch/setup.sh"
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# What launchers tell each of the processes that they start, and what jax needs to join them.
LAUNCHERS = {
    "SLURM_NTASKS": "start it with srun, as launch/train_slurm.sh does",
    "TPU_WORKER_HOSTNAMES": FOR_TPU,
    "JOB_COMPLETION_INDEX": 'pip install "jax[k8s]"',
    "WORLD_SIZE": BY_HAND,
} | dict.fromkeys(MPI, f"pip install mpi4py (for this MPI: MPI4PY_MPIABI), or {BY_HAND}")
# What a step of this process raises when another process is gone: status codes of the runtime,
# without those that speak of the program itself (out of memory, say).
LOST = r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION):"


@contextlib.contextmanager
def membership(stall_seconds: int = 0):
    """Around the program of a process: joins its cluster, if there is one, and leaves it.

    What jax recognises is joined: Cloud TPU VMs (by their metadata server), GKE, SLURM, MPI,
    Kubernetes. By hand, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    JAX_NUM_PROCESSES=1 runs alone whatever there is. No device may have been used before.

    If the others do not come within `stall_seconds` (0: JOIN_SECONDS), the process says so and ends
    with RESTART. When a process dies or stops later, jax ends all others with SIGABRT (status 134
    of a shell) and says which one it was, within HEARTBEAT_SECONDS, or `stall_seconds` if that is
    shorter.

    Raises:
      ValueError: this is one of several processes, after what its launcher or its TPU says, and it
        cannot join the others. Alone, each of them would train the whole run.
    """
    heartbeat = min(HEARTBEAT_SECONDS, stall_seconds or HEARTBEAT_SECONDS)
    count, method = _cluster()
    if count > 1:
        _join(count, method, stall_seconds or JOIN_SECONDS, heartbeat)
    _check_devices(count)
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            # If another process is to blame, its heartbeats will tell: jax names it and ends this
            # process.
            patience = 2 * heartbeat if re.match(LOST, str(error)) else 0
            status = error.code if isinstance(error, SystemExit) else 1
            threading.Thread(target=_leave, args=(patience, status), daemon=True).start()
        raise


def _cluster() -> tuple[int, str | None]:
    """(number of processes, the detection that jax must be asked for by name, if any).

    1 if nothing is said by hand and jax recognises no cluster. A cluster of one is not joined: it
    would take a port that a second run on the machine needs.

    Raises:
      ValueError: what is said by hand is not enough; or a launcher started several processes, and
        jax does not recognise its cluster.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    by_hand = {name: os.environ[name] for name in names if name in os.environ}
    numbers = [value for name, value in by_hand.items() if name != names[0]]
    if by_hand.get("JAX_NUM_PROCESSES") == "1":
        return 1, None
    if len(by_hand) == 3 and all(map(str.isdigit, numbers)):
        return int(by_hand["JAX_NUM_PROCESSES"]), None
    # An address alone tells jax where to meet in a cluster that it recognises.
    kind = None if numbers else _recognised()
    if by_hand and not kind:
        said = ", ".join(f"{name}={value}" for name, value in by_hand.items())
        raise ValueError(f"{said}: all of {', '.join(names)} are needed, the last two numbers")
    count = kind.get_process_count() if kind else 1
    if count == 1:
        _check_launcher(kind is not None)
    return count, kind.name if kind and kind.opt_in_only_method else None


def _recognised():
    """The kind of cluster that jax would join; None if there is none."""
    left_out = []
    if "JOB_COMPLETION_INDEX" not in os.environ:  # every pod looks like a cluster
        left_out.append(clusters.K8sCluster)
    if not any(name in os.environ for name in MPI):  # looks like one wherever it is installed
        left_out.append(clusters.Mpi4pyCluster)
    kinds = clusters.ClusterEnv._cluster_types
    return next((kind for kind in kinds if kind not in left_out and kind.is_env_present()), None)


def _join(count: int, method: str | None, patience: int, heartbeat: int) -> None:
    """Joins the `count` processes, or ends this one with RESTART after `patience` seconds."""
    numbers = {}
    if "JAX_NUM_PROCESSES" in os.environ:
        numbers = {"num_processes": count, "process_id": int(os.environ["JAX_PROCESS_ID"])}

    def give_up():
        state = distributed.global_state
        where = f" at {state.coordinator_address}" if state.coordinator_address else ""
        print(
            f"process {state.process_id} of {count} on {socket.gethostname()} has waited "
            f"{patience} s for the others{where}: at least one did not come. The log of each that "
            "runs says so; look why the other was not started, or cannot reach that address. "
            "(JAX_NUM_PROCESSES=1 runs one process alone.) "
            f"Ending with status {RESTART}; start the run again to go on.",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(RESTART)

    # jax itself would end with a SIGABRT and its stack; it is told to wait for longer than that.
    timer = threading.Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    jax.distributed.initialize(
        **numbers,
        cluster_detection_method=method,
        initialization_timeout=patience + 60,
        heartbeat_timeout_seconds=heartbeat,
    )
    timer.cancel()
    # With Gloo the processes must meet within half a minute in the first collective of a set of
    # devices, and later need not: the first step's would wait for the slowest compilation.
    everywhere = NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), P("all"))
    ones = jax.jit(lambda: jnp.ones(jax.device_count()), out_shardings=everywhere)()
    total = jax.jit(jnp.sum).lower(ones).compile()
    distributed.global_state.client.wait_at_barrier("compiled", 1000 * patience)
    jax.block_until_ready(total(ones))
    multihost_utils.sync_global_devices("joined")


def _check_launcher(recognised: bool) -> None:
    """Raises ValueError if the launcher has started several processes and jax counts one."""
    for name, remedy in LAUNCHERS.items():
        value = os.environ.get(name, "1")
        many = "," in value or (value.isdigit() and int(value) > 1)
        # The index of a pod does not say of how many.
        unknown = name == "JOB_COMPLETION_INDEX" and name in os.environ and not recognised
        if unknown or (many and name != "JOB_COMPLETION_INDEX"):
            raise ValueError(
                f"{name}={value}: this is one of several processes, and jax cannot find the "
                f"others: {remedy}. If it is meant to run alone, set JAX_NUM_PROCESSES=1"
            )


def _check_devices(count: int) -> None:
    """Raises ValueError if the devices are not those of `count` processes on this machine's chips.

    A TPU knows of its slice by itself: jax counts its processes, joined or not.
    """
    if jax.process_count() != count:
        raise ValueError(
            f"these devices belong to {jax.process_count()} processes, and jax has found {count}: "
            + BY_HAND
        )
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    if chips and jax.default_backend() == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        raise ValueError(
            f"this machine has {chips} TPU chip(s) that jax cannot use: {FOR_TPU}. To do "
            "without them, set JAX_PLATFORMS=cpu"
        )


def gather(value) -> list:
    """What each process has, by process; JSON can hold it, and all must call this."""
    if jax.process_count() == 1:
        return [value]
    said = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(said))).max())
    padded = np.frombuffer(said.ljust(longest), np.uint8)
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def agree(what: str, values: dict[str, str]) -> None:
    """Checks that `values` are the same in all processes; all must call it.

    Raises:
      ValueError: in every process, if they are not: each process that differs from process 0, with
        its host, and the first key in which it does.
    """
    if jax.process_count() == 1:
        return
    said = json.dumps(values, sort_keys=True).encode()
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.md5(said).digest(), np.uint8))
    if (digests == digests[0]).all():
        return
    (host, first), *others = gather([socket.gethostname(), values])
    lines = []
    for process, (other_host, other) in enumerate(others, 1):
        different = [key for key in first | other if first.get(key) != other.get(key)]
        if different:
            key = different[0]
            lines.append(
                f"process {process} on {other_host} has {key} = {other.get(key)!r}, "
                f"process 0 on {host} has {first.get(key)!r}"
            )
    raise ValueError(f"the processes of this run differ in their {what}:\n  " + "\n  ".join(lines))


def _leave(patience: int, status) -> None:
    """Ends this process when its main thread has said why. By itself it would wait for minutes, or
    for ever: jax, and the threads of a save, wait for the other processes, which wait for this one.
    """
    threading.main_thread().join()
    with contextlib.suppress(OSError):  # the disk of the log may be full
        sys.stdout.flush()
        if patience:
            print(f"{_name()}: is another process gone? Waiting {patience} s", file=sys.stderr)
    time.sleep(patience)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


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
                )
                faulthandler.dump_traceback(sys.stderr)
                sys.stderr.flush()
                os._exit(RESTART)


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
