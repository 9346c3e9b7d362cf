"""Joining a cluster: what is recognised, what is refused, and what the processes agree on."""

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import cloud
from otreg_jax import cluster

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 240
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
}
OMPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "3"}

JOIN = """
import jax
from otreg_jax import cluster
with cluster.membership({stall}):
    print("joined", jax.process_index(), jax.process_count(), jax.distributed.is_initialized())
    {body}
"""


@pytest.fixture
def environment(monkeypatch):
    """A function that sets variables; those of any launcher are unset before."""
    for name in os.environ:
        if name.startswith(("SLURM", "OMPI", "PMI", "TPU_", "KUBERNETES", "JOB_")):
            monkeypatch.delenv(name)
    for name in (*BY_HAND, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(*pair) for pair in variables.items()]


def run_all(machines: list[dict], stall: int = 60, body: str = "pass") -> list[tuple[int, str]]:
    """Runs a program that joins on each machine at once: (exit status, what it printed)."""
    program = JOIN.format(stall=stall, body=body)
    # jax sets TPU_SKIP_MDS_QUERY in the tests' own process, where there are no chips.
    base = {k: v for k, v in os.environ.items() if k not in BY_HAND and not k.startswith("TPU_")}
    base |= {"JAX_NUM_CPU_DEVICES": "1", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    processes = []
    for machine in machines:
        path = os.pathsep.join([machine.get("PYTHONPATH", ""), str(ROOT)])
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", program],
                env=base | machine | {"PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return [(process.wait(), text) for process in processes for text in [process.communicate()[0]]]


def by_hand(count: int) -> list[dict]:
    address = f"localhost:{cloud.free_port()}"
    return [
        dict(zip(BY_HAND, (address, str(count), str(index)), strict=True)) for index in range(count)
    ]


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        (SLURM, 4),
        (SLURM | {"SLURM_NTASKS": "1"}, 1),
        (OMPI, 3),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, 1),
        ({"WORLD_SIZE": "4", "JAX_NUM_PROCESSES": "1"}, 1),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "n2:1"}, 4),
        (dict(zip(BY_HAND, ("h:1", "2", "1"), strict=True)), 2),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ],
)
def test_the_processes_are_counted_as_jax_finds_them(environment, variables, count):
    environment(variables)
    assert cluster._cluster() == (count, None)


def test_the_only_worker_of_a_gke_slice_runs_alone(environment, monkeypatch):
    """Its pod has an index, as every pod of an indexed job; jax knows that there is one."""
    environment(
        {
            "TPU_WORKER_HOSTNAMES": "worker-0",
            "MEGASCALE_NUM_SLICES": "1",
            "JOB_COMPLETION_INDEX": "0",
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        }
    )
    monkeypatch.setattr(cluster.clusters.GkeTpuCluster, "is_env_present", lambda: True)
    assert cluster._cluster() == (1, None)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4: this is one of several.* start it with srun"),
        ({"PMI_SIZE": "2"}, "pip install mpi4py .*or set JAX_COORDINATOR_ADDRESS"),
        (SLURM | {"SLURM_NTASKS": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8: .* JAX_NUM_PROCESSES=1"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "OTREG_ACCELERATOR=tpu bash launch/setup.sh"),
        ({"JOB_COMPLETION_INDEX": "0"}, "jax.k8s"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_COORDINATOR_ADDRESS=h:1: all of"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "all of JAX_COORDINATOR_ADDRESS"),
        (dict(zip(BY_HAND, ("h:1", "two", "0"), strict=True)), "the last two numbers"),
    ],
)
def test_what_was_started_as_many_is_not_run_as_one(environment, variables, words):
    environment(variables)
    with pytest.raises(ValueError, match=words), cluster.membership():
        pytest.fail("one process of several ran alone")


def test_a_tpu_slice_that_was_not_joined_is_refused(environment, monkeypatch):
    environment({})
    monkeypatch.setattr(cluster.jax, "process_count", lambda: 8)
    with pytest.raises(ValueError, match="belong to 8 processes, and jax has found 1"):
        cluster._check_devices(1)


def test_chips_that_jax_cannot_use_are_not_passed_over(environment, monkeypatch):
    environment({})
    chips = lambda: (4, None)
    monkeypatch.setattr(cluster.hardware_utils, "num_available_tpu_chips_and_device_id", chips)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cluster._check_devices(1)
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ValueError, match="4 TPU chip.* OTREG_ACCELERATOR=tpu bash launch/setup.sh"):
        cluster._check_devices(1)


@pytest.mark.parametrize(("slices", "workers"), [(1, 2), (2, 1), (1, 1)])
def test_tpu_vms_find_each_other_through_the_metadata_server(tmp_path, slices, workers):
    """Only the metadata server and the chips are played; jax does the rest."""
    with contextlib.ExitStack() as stack:
        machines = []
        port = cloud.free_port()
        for index in range(slices * workers):
            said = cloud.attributes(slices, workers, *divmod(index, workers))
            address = stack.enter_context(cloud.metadata_server(said))
            machines.append(cloud.machine(tmp_path / str(index), address, port))
        ended = run_all(machines)
    count = slices * workers
    for index, (status, printed) in enumerate(ended):
        assert status == 0, printed
        assert f"joined {index} {count} {count > 1}" in printed


def test_a_process_that_never_comes_is_waited_for_no_longer_than_was_set():
    *_, last = by_hand(3)
    for status, printed in run_all([by_hand(3)[0], last], stall=5):
        assert status == cluster.RESTART
        assert "has waited 5 s for the others at localhost" in printed
        assert len(printed.strip().splitlines()) == 1  # one line, no stack of a SIGABRT


def test_processes_that_differ_are_named():
    body = (
        "mine = {'config': 'a', 'corpus/train': '1'}\n"
        "    cluster.agree('settings', mine)\n"
        "    print('agreed', flush=True)\n"
        "    mine['corpus/train'] = str(1 + jax.process_index())\n"
        "    cluster.agree('corpus', mine)"
    )
    for status, printed in run_all(by_hand(2), body=body):
        assert status == 1 and "agreed" in printed
        assert "the processes of this run differ in their corpus:\n  process 1 on" in printed
        assert "corpus/train = '2', process 0 on" in printed


HELD = """
import sys, threading
from otreg_jax import cluster
threading.Thread(target=threading.Event().wait).start()  # as that of a save, which waits for others
threading.Thread(target=cluster._leave, args=(0, 7), daemon=True).start()
sys.exit(f"why: {len(threading.enumerate())} threads")
"""


def test_a_process_that_failed_ends_whatever_its_threads_wait_for():
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "why: 3 threads\n")
