"""launch/setup.sh, train_local.sh, test.sh, train_slurm.sh against fakes (tests/launching.py)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, calls, launch


def test_scripts_are_shellcheck_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "-x", *sorted(ROOT.glob("launch/*.sh")), ROOT / "benchmarks/gpu.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
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


@pytest.mark.parametrize("changed", ["requirements.txt", "pyproject.toml"])
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
        ("tpu", None, ["-r", "requirements-tpu.txt", "jax[tpu]==1.2.3"]),
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
    assert calls(fake, "ruff") == [["check"], ["format", "--check", "--quiet"]]
    assert calls(fake, "python") == [["-m", "pytest", "-n", "2", "-k", "name with spaces"]]
    assert printed.endswith("python -m pytest -n 2 -k name with spaces\n")


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
        ("0", 0, 0, False),
        ("75", 3, 0, True),
        ("75", 100, 75, False),
        ("1", 0, 1, False),
        ("134", 0, 0, True),
        ("137", 0, 0, True),
    ],
)
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
