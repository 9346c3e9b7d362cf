"""The launch scripts, run for real against fake python, gcloud, srun, sbatch and scontrol.

The fakes record their calls in $FAKE/calls, one line a call with the arguments shell-quoted, and
take what they should do from files in $FAKE. Each TPU worker is a directory; the fake ssh and scp
run and copy there, so that launch/tpu_worker.sh and its detached training are the real ones.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TPU = (
    "--name=run --zone=us-east5-a --type=v5p-16 --config=configs/x.py --workdir=gs://b/run".split()
)

RECORD = """#!/usr/bin/env bash
set -eu
record() { printf '%q ' "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls"; }
pop() {  # FILE: takes its first line; workers do so at once, so one after the other
  [[ -s $FAKE/$1 ]] || return 0
  until mkdir "$FAKE/lock" 2>/dev/null; do sleep 0.01; done
  head -n 1 "$FAKE/$1"
  sed -i 1d "$FAKE/$1"
  rmdir "$FAKE/lock"
}
"""

# Builds a .venv whose python is itself; "trains" by exiting with the next code of $FAKE/train, or
# of $FAKE/train.worker0: which worker comes first to the common file is not known.
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
      if mkdir "$FAKE/preempted" 2>/dev/null; then echo SUSPENDED >"$FAKE/state"; fi
      exit 143
    fi
    if [[ $code == killed ]]; then kill -9 "$PPID" && exit 1; fi
    if [[ $code == wait ]]; then until [[ -e $FAKE/go ]]; do sleep 0.1; done && exit 0; fi
    exit "${code:-0}" ;;
  *) record "$(basename "$0")" "$@" && echo "$(basename "$0") $*" ;;
esac
"""

# One queued resource with one node. $FAKE/create holds what each request comes to: a state of the
# request, or an error message.
GCLOUD = """
record gcloud "$@"
state=$(cat "$FAKE/state" 2>/dev/null || true)
command=
for argument in "$@"; do
  case $argument in
    --worker=0) workers=$FAKE/worker0 ;;
    --worker=all) workers="$FAKE/worker0 $FAKE/worker1" ;;
    --command=*) command=${argument#*=} ;;
  esac
done
case "$3 $4" in
  *describe)
    [[ $state ]] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; }
    case "$3 $*" in
      *failedData*) cat "$FAKE/failed" 2>/dev/null || true ;;
      tpu-vm*) echo "${state/ACTIVE/READY}" ;;
      *) echo "$state" ;;
    esac ;;
  *create)
    next=$(pop create)
    [[ $next != *' '* ]] || { echo "ERROR: (gcloud) $next" >&2; exit 1; }
    echo "${next:-ACTIVE}" >"$FAKE/state" ;;
  *delete) rm -rf "$FAKE/state" "$FAKE"/worker* ;;
  *) [[ $state == ACTIVE ]] || { echo "ERROR: the node is not READY" >&2; exit 1; }
    [[ $4 != scp || $(pop scp) != fail ]] || exit 1
    status=0
    for worker in $workers; do
      mkdir -p "$worker"
      if [[ $4 == scp ]]; then cp "$5" "$worker"; continue; fi
      (cd "$worker" && HOME=$worker bash -c "$command") || status=$?
    done
    exit "$status" ;;
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
    for name in ("requirements.txt", "requirements-dev.txt", "setup.py"):
        (repository / name).write_text("jax==1.2.3\n")
    (repository / ".gitignore").write_text(".venv/\n.cache/\nruns/\n")
    scripts = {"python3": PYTHON, "gcloud": GCLOUD, "srun": SRUN}
    scripts |= {name: f'record {name} "$@"' for name in ("sbatch", "scontrol")}
    scripts |= {"nvidia-smi": 'cat "$FAKE/driver"'}
    for name, script in scripts.items():
        (bin / name).write_text(RECORD + script)
        (bin / name).chmod(0o755)
    for command in ("init -q", "add .", "-c user.name=t -c user.email=t@t commit -qm first"):
        subprocess.run(["git", *command.split()], cwd=repository, check=True)
    for variable in [v for v in os.environ if v.startswith(("SLURM", "SBATCH", "JAX_", "OTREG_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(home))
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


def verbs(fake):
    """What was asked of gcloud that changes something, e.g. ["create", "scp", "ssh start"]."""
    found = []
    for call in calls(fake, "gcloud"):
        command = re.search(r".*tpu_worker.sh (\w+)", " ".join(call))
        found.append(f"{call[3]} {command[1]}" if command else call[3])
    return [verb for verb in found if verb not in ("describe", "ssh running")]


ATTEMPT = ["scp", "ssh setup", "ssh start", "ssh follow", "ssh finish", "ssh log"]


def test_scripts_are_shellcheck_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, *sorted(ROOT.glob("launch/*.sh"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------- setup.sh


def test_setup_installs_once(fake):
    assert "creating .venv" in launch("setup.sh")
    assert calls(fake, "pip") == [
        ["install", "--quiet", "-r", "requirements.txt"],
        ["install", "--quiet", "--no-deps", "-e", "."],
    ]
    assert launch("setup.sh") == ""
    assert len(calls(fake, "pip")) == 2


@pytest.mark.parametrize("changed", ["requirements.txt", "setup.py"])
def test_setup_follows_changed_requirements(fake, changed):
    launch("setup.sh")
    Path(changed).write_text("jax==1.2.4\n")
    launch("setup.sh")
    assert len(calls(fake, "venv")) == 1
    assert len(calls(fake, "pip")) == 4


def test_setup_keeps_the_two_requirements_apart(fake):
    launch("setup.sh")
    launch("setup.sh", "requirements-dev.txt")
    assert launch("setup.sh") == ""
    assert launch("setup.sh", "requirements-dev.txt") == ""
    installed = [call[3] for call in calls(fake, "pip")[::2]]
    assert installed == ["requirements.txt", "requirements-dev.txt"]


def test_setup_does_not_trust_an_interrupted_installation(fake):
    launch("setup.sh")
    Path(".venv/.installing").touch()
    launch("setup.sh")
    assert len(calls(fake, "venv")) == 2
    assert not Path(".venv/.installing").exists()
    assert launch("setup.sh") == ""


def test_setup_says_what_to_do_offline(fake):
    (fake / "pip").write_text("1\n")
    assert "PIP_FIND_LINKS" in launch("setup.sh", code=1)
    launch("setup.sh")
    assert len(calls(fake, "pip")) == 3


def test_setup_names_a_python_that_is_too_old_or_missing(fake, monkeypatch):
    monkeypatch.setenv("PYTHON", "/no/such/python")
    message = launch("setup.sh", code=1)
    assert "Python 3.11 or newer is needed; tried: /no/such/python" in message
    assert not Path(".venv").exists()


def test_setup_names_missing_requirements(fake):
    message = launch("setup.sh", "requirements-typo.txt", code=1)
    assert "there is no requirements-typo.txt; there are: requirements-dev.txt" in message


@pytest.mark.parametrize(
    ("accelerator", "driver", "jax"),
    [
        ("cpu", None, []),
        ("tpu", None, ["jax[tpu]==1.2.3"]),
        (None, "580.65.06", ["jax[cuda13]==1.2.3"]),
        (None, "550.90.07", ["jax[cuda12]==1.2.3"]),
    ],
)
def test_setup_installs_jax_for_the_accelerator(fake, monkeypatch, accelerator, driver, jax):
    if driver:
        (fake / "driver").write_text(f"{driver}\n")
    else:
        monkeypatch.setenv("OTREG_ACCELERATOR", accelerator)
    launch("setup.sh")
    assert calls(fake, "pip")[0] == ["install", "--quiet", "-r", "requirements.txt", *jax]


def test_setup_rejects_an_unknown_accelerator(fake, monkeypatch):
    monkeypatch.setenv("OTREG_ACCELERATOR", "gpu")
    assert "OTREG_ACCELERATOR is 'gpu'; use cpu, cuda or tpu" in launch("setup.sh", code=1)


# ---------------------------------------------------------------- train_local.sh, test.sh


@pytest.mark.parametrize("workdir", [[], ["--workdir=w/"], ["--workdir", "w"]])
def test_quickstart_trains_three_arms_and_compares_them(fake, workdir):
    launch("train_local.sh", *workdir, "--config.steps=3")
    directory = "w" if workdir else "runs/quickstart"
    quickstart = f"{Path.cwd()}/configs/quickstart.py"
    shared = [f"--config.data.cache={directory}/data", f"--config.llm.path={directory}/llm"]
    assert calls(fake, "train") == [
        [f"--config={quickstart}:otreg", f"--workdir={directory}", "--config.steps=3"],
        *(
            [f"--config={quickstart}:{arm}", f"--workdir={directory}-{arm}", *shared]
            + ["--config.steps=3"]
            for arm in ("ce", "position")
        ),
    ]
    assert calls(fake, "python")[-1] == [
        "-m",
        "otreg_jax.evaluate",
        f"--workdir={directory}",
        f"--compare={directory}-ce",
        f"--compare={directory}-position",
    ]


def test_quickstart_stops_at_the_first_failure(fake):
    (fake / "train").write_text("0\n3\n")
    launch("train_local.sh", code=3)
    assert len(calls(fake, "train")) == 2


def test_train_local_hands_a_config_to_train(fake):
    (fake / "train").write_text("75\n")
    flags = ["--workdir=w", "--config", "configs/x.py", "--config.seed=1"]
    launch("train_local.sh", *flags, code=75)
    assert calls(fake, "train") == [flags]


def test_test_sh_lints_then_runs_pytest(fake):
    printed = launch("test.sh", "-k", "name with spaces")
    assert calls(fake, "pip")[0][3] == "requirements-dev.txt"
    assert calls(fake, "ruff") == [["check"]]
    assert calls(fake, "python") == [["-m", "pytest", "-n", "2", "-k", "name with spaces"]]
    assert printed.endswith("python -m pytest -n 2 -k name with spaces\n")


# ---------------------------------------------------------------- train_tpu.sh


def test_tpu_provisions_trains_on_all_workers_and_deletes(fake):
    printed = launch("train_tpu.sh", *TPU, "--spot", "--config.a=it's a test")
    assert verbs(fake) == ["create", *ATTEMPT, "delete"]
    create = calls(fake, "gcloud")[1]
    assert (
        create
        == (
            "compute tpus queued-resources create run --node-id=run --accelerator-type=v5p-16 "
            "--runtime-version=v2-alpha-tpuv5 --spot --zone=us-east5-a --quiet"
        ).split()
    )
    flags = ["--config=configs/x.py", "--workdir=gs://b/run", "--config.a=it's a test"]
    assert calls(fake, "train") == [flags, flags]
    assert "STILL EXISTS" not in printed
    assert not (fake / "state").exists()
    log = Path("runs/logs/run/0.log").read_text()
    assert len(re.findall(r"^\S+: step 1 of -m otreg_jax.train", log, re.M)) == 2


def test_tpu_resumes_after_training_saved_and_left(fake):
    (fake / "train").write_text("75\n75\n")
    launch("train_tpu.sh", *TPU)
    assert verbs(fake) == ["create", *ATTEMPT, *ATTEMPT, "delete"]
    assert len(calls(fake, "train")) == 4


def test_tpu_is_requested_again_after_a_preemption(fake):
    (fake / "train").write_text("preempt\npreempt\n")
    printed = launch("train_tpu.sh", *TPU, "--spot")
    assert "run is SUSPENDED" in printed
    assert verbs(fake) == ["create", *ATTEMPT[:4], "delete", "create", *ATTEMPT, "delete"]


def test_tpu_restarts_are_bounded(fake):
    (fake / "train").write_text("75\n" * 20)
    printed = launch("train_tpu.sh", *TPU, "--max-restarts=1", code=1)
    assert "giving up after 1 restart(s); the last reason: training was interrupted" in printed
    assert "run (READY) STILL EXISTS in us-east5-a" in printed
    delete = re.search(r"delete it: +(.*)", printed)[1]
    subprocess.run(["bash", "-c", delete], check=True)
    assert not (fake / "state").exists()


def test_tpu_failed_training_is_not_repeated_and_announced(fake):
    (fake / "train").write_text("1\n1\n")
    printed = launch("train_tpu.sh", *TPU, code=1)
    assert "training failed (exit codes: 1 ); see runs/logs/run/0.log" in printed
    assert "run (READY) STILL EXISTS" in printed
    assert verbs(fake) == ["create", *ATTEMPT]


@pytest.mark.parametrize("where", ["create", "failed"])
def test_tpu_gives_up_on_quota(fake, where):
    message = "Quota limit 'TPUV5PPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0"
    (fake / where).write_text(f"{message}\n")
    if where == "failed":
        (fake / "create").write_text("FAILED\n")
    printed = launch("train_tpu.sh", *TPU, code=1)
    assert "giving up: the quota for v5p-16 in us-east5-a does not allow this" in printed
    assert message in printed
    assert verbs(fake) == ["create"]
    assert ("nothing is left running" in printed) == (where == "create")


def test_tpu_request_is_repeated_without_capacity_but_not_without_permission(fake):
    (fake / "create").write_text("UNAVAILABLE: no more capacity in the zone\nFAILED\nACTIVE\n")
    launch("train_tpu.sh", *TPU)
    assert verbs(fake) == ["create", "create", "delete", "create", *ATTEMPT, "delete"]
    (fake / "create").write_text("PERMISSION_DENIED: no access\n")
    assert "gcloud refused the request" in launch("train_tpu.sh", *TPU, code=1)


def test_tpu_worker_left_behind_is_stopped_before_the_restart(fake, monkeypatch):
    monkeypatch.setenv("OTREG_FINISH_SECONDS", "0.5")
    (fake / "train.worker0").write_text("75\n")
    (fake / "train.worker1").write_text("wait\n")
    printed = launch("train_tpu.sh", *TPU)
    assert "not all workers have ended; restart 1 of 20" in printed
    assert len(calls(fake, "train")) == 4
    assert verbs(fake) == ["create", *ATTEMPT, *ATTEMPT, "delete"]


def test_tpu_run_killed_with_its_shell_is_started_again(fake):
    (fake / "train").write_text("killed\n")
    printed = launch("train_tpu.sh", *TPU)
    assert "training was interrupted (exit codes: 0 lost )" in printed
    assert len(calls(fake, "train")) == 4


def test_tpu_death_of_a_process_is_told_from_a_failure(fake):
    (fake / "train").write_text("137\n134\n")  # one is killed, JAX ends the other
    printed = launch("train_tpu.sh", *TPU)
    assert "training was interrupted (exit codes: 134 137 ); restart 1 of 20" in printed
    (fake / "train").write_text("1\n134\n")
    assert "training failed (exit codes: 1 134 )" in launch("train_tpu.sh", *TPU, code=1)


def test_tpu_copy_that_fails_is_repeated(fake):
    (fake / "scp").write_text("fail\n")
    launch("train_tpu.sh", *TPU)
    assert verbs(fake) == ["create", "scp", *ATTEMPT, "delete"]


def test_tpu_ctrl_c_leaves_training_and_the_same_command_follows_it_again(fake):
    (fake / "train").write_text("wait\nwait\n")
    command = ["bash", "launch/train_tpu.sh", *TPU]

    def start_and_wait_for_follow(count):
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A job started in the background ignores Ctrl-C, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while verbs(fake).count("ssh follow") < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return process

    first = start_and_wait_for_follow(1)
    os.killpg(first.pid, signal.SIGINT)
    printed = first.communicate(timeout=240)[1]
    assert first.returncode == 130
    assert "run (READY) STILL EXISTS" in printed
    assert f"follow it again: {' '.join(command)}" in printed

    second = start_and_wait_for_follow(2)
    (fake / "go").touch()
    printed = second.communicate(timeout=240)[1]
    assert second.returncode == 0, printed
    assert "training is already running on run; following it" in printed
    assert len(calls(fake, "train")) == 2
    assert verbs(fake).count("scp") == 1
    assert verbs(fake)[-1] == "delete"


def test_tpu_existing_is_neither_created_nor_deleted(fake):
    printed = launch("train_tpu.sh", *TPU, "--existing", code=1)
    assert "run is MISSING; --existing takes a running TPU VM and makes none" in printed
    (fake / "state").write_text("ACTIVE\n")
    printed = launch("train_tpu.sh", *TPU, "--existing")
    assert verbs(fake) == ATTEMPT
    assert "gcloud compute tpus tpu-vm delete run --zone=us-east5-a" in printed


def test_tpu_keep_announces_what_it_keeps(fake):
    printed = launch("train_tpu.sh", *TPU, "--keep")
    assert verbs(fake) == ["create", *ATTEMPT]
    assert "run (READY) STILL EXISTS" in printed


def test_tpu_dry_run_prints_every_command_and_runs_none(fake):
    printed = launch("train_tpu.sh", *TPU, "--dry-run", "--project=p", "--config.a=it's")
    assert not (fake / "calls").exists()
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("gcloud ")]
    assert [command[4] for command in commands] == (
        ["create", "scp", "ssh", "ssh", "ssh", "ssh", "ssh", "delete"]
    )
    assert all({"--project=p", "--zone=us-east5-a"} <= set(command) for command in commands)
    assert any("--config.a=it's" in shlex.split(" ".join(command)) for command in commands)


def test_tpu_lists_every_problem_at_once(fake):
    flags = ["--type=v5e-16", "--config=configs/none.py", "--workdir=runs/x", "--sopt"]
    printed = launch("train_tpu.sh", *flags, code=2)
    for problem in (
        "unknown option --sopt",
        "--name is missing",
        "--zone is missing",
        "there is no config file configs/none.py",
        "--workdir must be a gs:// directory",
        "--type v5litepod-16",
    ):
        assert problem in printed
    assert not (fake / "calls").exists()


def test_tpu_warns_of_uncommitted_changes(fake):
    Path("configs/x.py").write_text("changed\n")
    assert "uncommitted changes are not copied" in launch("train_tpu.sh", *TPU)


# ---------------------------------------------------------------- train_slurm.sh

FLAGS = ["--config=configs/x.py", "--workdir=/shared/run"]


def test_slurm_submits_itself_outside_a_job(fake, monkeypatch):
    monkeypatch.setenv("SBATCH_ARGS", "--nodes=4 --gpus-per-node=8")
    launch("train_slurm.sh", *FLAGS)
    root = Path.cwd()
    options = ["--wait", f"--chdir={root}", "--nodes=4", "--gpus-per-node=8"]
    assert calls(fake, "sbatch") == [[*options, f"{root}/launch/train_slurm.sh", *FLAGS]]
    assert not calls(fake, "srun")


@pytest.mark.parametrize(
    ("train", "restarts", "code", "requeued"),
    [
        ("0", 0, 0, False), ("75", 3, 0, True), ("75", 100, 75, False), ("1", 0, 1, False),
        ("134", 0, 0, True), ("137", 0, 0, True),
    ],
)  # fmt: skip
def test_slurm_requeues_only_what_was_interrupted(
    fake, monkeypatch, train, restarts, code, requeued
):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    (fake / "train").write_text(f"{train}\n")
    launch("train_slurm.sh", *FLAGS, code=code)
    assert calls(fake, "train") == [FLAGS]
    assert calls(fake, "scontrol") == ([["requeue", "17"]] if requeued else [])


def test_slurm_gives_the_process_all_gpus_of_its_node(fake, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    python = Path(shutil.which("python3"))
    script = python.read_text()
    python.write_text(script.replace("record train", "record ids $JAX_LOCAL_DEVICE_IDS"))
    launch("train_slurm.sh", *FLAGS)
    assert calls(fake, "ids")[0][0] == "0,1,2,3"


def test_slurm_finds_the_repository_from_the_spool_directory(fake, monkeypatch, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    script = shutil.copy("launch/train_slurm.sh", spool)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(Path.cwd()))
    subprocess.run(["bash", script, *FLAGS], check=True, cwd=spool)
    assert calls(fake, "train") == [FLAGS]
