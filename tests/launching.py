"""The launch scripts, run for real against fake python, srun, sbatch, scontrol and a played gcloud.

The fakes record their calls in $FAKE/calls, one line a call with the arguments shell-quoted, and
take what they should do from files in $FAKE. Each TPU worker is a directory; the played ssh and scp
run and copy there, so that launch/tpu_worker.sh and its detached training are the real ones.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cloud

ROOT = Path(__file__).resolve().parents[1]

RECORD = """#!/usr/bin/env bash
set -eu
record() {  # workers record at once: one write a line, so that no line is cut by another's
  local line
  printf -v line '%q ' "$@"
  printf '%s\\n' "$line" >>"$FAKE/calls"
}
pop() {  # FILE: takes its first line; workers do so at once, so one after the other
  [[ -s $FAKE/$1 ]] || return 0
  until mkdir "$FAKE/lock" 2>/dev/null; do sleep 0.01; done
  head -n 1 "$FAKE/$1"
  sed -i 1d "$FAKE/$1"
  rmdir "$FAKE/lock"
}
"""

# Builds a .venv whose python is itself; "trains" by exiting with the next code of $FAKE/train, or
# of $FAKE/train.run-0: which worker comes first to the common file is not known.
# `preempt` takes the TPU away in the middle of training.
PYTHON = """
case "$*" in
  -c*) exec "$REAL_PYTHON" "$@" ;;
  "-m venv"*)
    record venv
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    cp "$0" .venv/bin/ruff ;;
  "-m pip"*) record pip "${@:3}" && code=$(pop pip) && exit "${code:-0}" ;;
  "-m otreg_jax.train"*)
    record train "${@:3}"
    echo "step 1 of $*"
    code=$(pop "train.$(basename "$HOME")")
    code=${code:-$(pop train)}
    if [[ $code == preempt ]]; then
      until grep -q follow "$FAKE/calls" && [[ ! -s $FAKE/train ]]; do sleep 0.1; done
      # Once: the other worker may come here when the next TPU is there already.
      if mkdir "$FAKE/preempted" 2>/dev/null; then echo SUSPENDED >"$FAKE/request"; fi
      exit 143
    fi
    if [[ $code == killed ]]; then kill -9 "$PPID" && exit 1; fi
    if [[ $code == wait ]]; then until [[ -e $FAKE/go ]]; do sleep 0.1; done && exit 0; fi
    exit "${code:-0}" ;;
  *) record "$(basename "$0")" "$@" && echo "$(basename "$0") $*" ;;
esac
"""

SRUN = """
record srun "$@"
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A repository holding only the launch scripts, and a PATH that starts with the fakes."""
    repository, home, bin = tmp_path / "repository", tmp_path / "fake", tmp_path / "bin"
    home.mkdir()
    bin.mkdir()
    shutil.copytree(ROOT / "launch", repository / "launch")
    (repository / "configs").mkdir()
    (repository / "configs/x.py").touch()
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        (repository / name).write_text("jax==1.2.3\n")
    (repository / ".gitignore").write_text(".venv/\n.cache/\nruns/\n")
    scripts = {"python3": PYTHON, "srun": SRUN}
    scripts |= {name: f'record {name} "$@"' for name in ("sbatch", "scontrol")}
    scripts |= {"nvidia-smi": 'cat "$FAKE/driver"'}
    for name, script in scripts.items():
        (bin / name).write_text(RECORD + script)
        (bin / name).chmod(0o755)
    cloud.install_gcloud(bin)
    for command in ("init -q", "add .", "-c user.name=t -c user.email=t@t commit -qm first"):
        subprocess.run(["git", *command.split()], cwd=repository, check=True)
    for variable in [v for v in os.environ if v.startswith(("SLURM", "SBATCH", "JAX_", "OTREG_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(home))
    monkeypatch.setenv("PLAYED_CLOUD", str(home))
    monkeypatch.setenv("REAL_PYTHON", sys.executable)
    monkeypatch.setenv("OTREG_POLL_SECONDS", "0")
    monkeypatch.chdir(repository)
    return home


def launch(script, *arguments, code=0):
    """Runs launch/SCRIPT, checks its exit code, returns all it printed."""
    done = subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def calls(fake, program):
    """Arguments of the recorded calls of `program`, in order."""
    file = fake / "calls"
    lines = [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line[1:] for line in lines if line[0] == program]
