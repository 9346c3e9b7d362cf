"""Sweeps: what it runs, what it skips, and what it makes of the results."""

import json
import sys
from pathlib import Path

import pytest

from otreg_jax import sweep

RECIPE = """
from ml_collections import ConfigDict

def get_config(arm="ce"):
    if arm not in ("ce", "otreg"):
        raise ValueError("no such arm")
    return ConfigDict({"seed": 0, "steps": 1, "otreg": {"weight": 0.0, "epsilon": (0.1, 0.2)}})
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with the recipe x.py; commands are recorded in work.commands instead of run.

    "Evaluation" writes WERs that follow from weight and seed; a run with weight in work.failing
    fails to train.
    """
    monkeypatch.chdir(tmp_path)
    Path("x.py").write_text(RECIPE)

    class Work:
        commands: list[list[str]] = []
        failing: dict[str, int] = {}

    def execute(command, log):
        Work.commands.append(command)
        directory = Path(command[-1].removeprefix("--workdir="))
        flags = dict(flag.split("=", 1) for flag in command if flag.startswith("--"))
        if "otreg_jax.evaluate" not in command:
            (directory / "flags").write_text(json.dumps(flags))
            weight = flags.get("--config.otreg.weight", "0")
            log.write_text(f"loss is nan at weight {weight}\n")
            return Work.failing.get(weight, 0)
        flags = json.loads((directory / "flags").read_text())
        wer = 0.1 + 0.01 * float(flags.get("--config.otreg.weight", 0))
        wer += 0.02 * float(flags.get("--config.seed", 0))
        sets = {
            "dev": {"wer": wer, "cer": wer / 2, "n": 5, "in_domain": True},
            "noise": {"wer": 2 * wer, "cer": wer, "n": 5, "in_domain": False},
            "voices": {"wer": 4 * wer, "cer": wer, "n": 5, "in_domain": False},
        }
        (directory / "eval").mkdir(exist_ok=True)
        (directory / "eval/results.json").write_text(json.dumps({"sets": sets}))
        return 0

    Work.commands, Work.failing = [], {}
    monkeypatch.setattr(sweep, "execute", execute)
    return Work


def run(*arguments):
    return sweep.cli(["--workdir=w", *arguments])


def trained(work):
    """Run directories that were trained, in order."""
    return [c[-1].removeprefix("--workdir=w/") for c in work.commands if "x" in " ".join(c[1:4])]


GRID = ("--config=x.py", "--sweep", "otreg.weight=0,3;seed=0,1")


def test_grid_trains_then_evaluates_every_combination(work):
    assert run(*GRID, "--set", "steps=7") == 0
    assert len(work.commands) == 8
    assert work.commands[2] == [
        *[sys.executable, "-m", "otreg_jax.train", "--config=x.py", "--config.steps=7"],
        *["--config.otreg.weight=0", "--config.seed=1", "--workdir=w/otreg.weight-0_seed-1"],
    ]
    assert work.commands[3] == [
        *[sys.executable, "-m", "otreg_jax.evaluate", "--workdir=w/otreg.weight-0_seed-1"]
    ]


def test_sweeps_add_up_and_values_may_hold_commas(work):
    sweeps = ["--sweep", "otreg.epsilon=(1, 2),0.5", "--sweep", "seed=4"]
    assert run("--config=x.py", *sweeps) == 0
    flags = [command[-2] for command in work.commands[::2]]
    assert flags == ["--config.otreg.epsilon=(1, 2)", "--config.otreg.epsilon=0.5"] + [
        "--config.seed=4"
    ]


def test_the_recipe_can_be_an_axis(work):
    assert run("--sweep", "config=x.py:ce,x.py:otreg;seed=0") == 0
    assert [command[3] for command in work.commands[::2]] == [
        *["--config=x.py:ce", "--config=x.py:otreg"]
    ]
    assert Path("w/config-x-otreg_seed-0/eval/results.json").exists()


def test_table_has_mean_and_sample_deviation_over_seeds(work, capsys):
    run(*GRID)
    lines = Path("w/table.md").read_text().splitlines()
    assert lines[0] == "wer (%), mean ± sample standard deviation over seeds"
    assert lines[2] == "| otreg.weight | runs | dev | noise | voices | out-of-domain mean |"
    # Seeds 0 and 1 at weight 3 give 13 and 15 on dev: mean 14, deviation sqrt(2).
    assert lines[5] == ("| 3 | 2 | 14.00 ± 1.41 | 28.00 ± 2.83 | 56.00 ± 5.66 | 42.00 ± 4.24 |")
    assert lines[5] in capsys.readouterr().out
    results = [json.loads(line) for line in Path("w/results.jsonl").read_text().splitlines()]
    assert [result["run"] for result in results[:2]] == [
        *["otreg.weight-0_seed-0", "otreg.weight-0_seed-1"]
    ]
    assert Path("w/plot.png").read_bytes().startswith(b"\x89PNG")


def test_another_metric_and_a_single_seed(work):
    run("--config=x.py", "--sweep", "otreg.weight=0,3", "--metric=cer")
    assert Path("w/table.md").read_text().splitlines()[4].startswith("| 0 | 1 | 5.00 | 10.00 |")
    with pytest.raises(SystemExit, match="set dev has no 'bleu', only wer, cer, n, in_domain"):
        run("--config=x.py", "--sweep", "otreg.weight=0,3", "--metric=bleu")


def test_finished_runs_are_not_repeated(work):
    run(*GRID)
    work.commands.clear()
    assert run("--config=x.py", "--sweep", "otreg.weight=0,3,5;seed=0,1") == 0
    assert trained(work) == ["otreg.weight-5_seed-0"] * 2 + ["otreg.weight-5_seed-1"] * 2


def test_a_run_finished_with_other_values_is_repeated(work):
    run(*GRID)
    work.commands.clear()
    run(*GRID, "--set", "steps=9")
    assert len(work.commands) == 8


def test_a_failure_is_reported_at_the_end_and_repeated_next_time(work, capsys):
    work.failing = {"0": 1}
    assert run(*GRID) == 1
    out = capsys.readouterr().out
    assert "2 of 4 runs failed; the same command repeats them:" in out
    assert "training failed with exit status 1: loss is nan at weight 0 (all of it: w/" in out
    assert len(Path("w/table.md").read_text().splitlines()) == 5
    work.failing = {}
    work.commands.clear()
    assert run(*GRID) == 0
    assert len(work.commands) == 4


def test_an_interrupted_run_says_that_it_can_be_resumed(work, capsys):
    work.failing = {"0": 75}
    assert run(*GRID) == 1
    assert "training was interrupted; the same command resumes it" in capsys.readouterr().out


def test_ctrl_c_stops_and_the_same_command_goes_on(work, monkeypatch):
    execute = sweep.execute

    def interrupted(command, log):
        if "seed-1" in command[-1]:
            raise KeyboardInterrupt
        return execute(command, log)

    monkeypatch.setattr(sweep, "execute", interrupted)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on from here"):
        run("--config=x.py", "--sweep", "seed=0,1,2")
    monkeypatch.setattr(sweep, "execute", execute)
    assert run("--config=x.py", "--sweep", "seed=0,1,2") == 0
    assert trained(work).count("seed-0") == 2  # trained and evaluated once


def test_a_launcher_replaces_the_training_command(work):
    run("--config=x.py", "--sweep", "seed=1", "--launcher", "bash launch/train_slurm.sh")
    assert work.commands[0][:3] == ["bash", "launch/train_slurm.sh", "--config=x.py"]


def test_every_problem_is_listed_and_nothing_is_started(work):
    sweeps = ["otreg.wieght=1;seed=0;seed=1", "weight", "steps=1,1", "otreg.epsilon=1,,2", ";"]
    sweeps += ["config=none.py", "steps=3;3"]
    flags = [f"--sweep={text}" for text in sweeps]
    with pytest.raises(SystemExit) as error:
        run("--config=x.py", "--set=steps", "--set=seed=1", *flags)
    for problem in (
        "--set 'steps' is not of the form key=value",
        "seed is swept twice in 'otreg.wieght=1;seed=0;seed=1'",
        "x.py has no key otreg.wieght (did you mean 'otreg.weight'?)",
        "'weight' is not of the form key=value,value",
        "steps has the same value twice in 'steps=1,1'",
        "otreg.epsilon lacks a value in 'otreg.epsilon=1,,2'",
        "cannot load the recipe none.py: none.py: no such file",
        "--sweep ';' names nothing",
        "'3' is not of the form key=value,value",
        "seed is both swept and in --set",
    ):
        assert f"\n  - {problem}" in str(error.value)
    assert not work.commands


def test_a_missing_config_and_equal_runs_are_problems(work):
    with pytest.raises(SystemExit, match="--config is missing"):
        run("--sweep", "seed=0")
    with pytest.raises(SystemExit, match="two runs are called seed-0"):
        run("--config=x.py", "--sweep", "seed=0,1", "--sweep", "seed=0")
    with pytest.raises(SystemExit, match="x.py:typo: no such arm"):
        run("--config=x.py:typo", "--sweep", "seed=0")


def test_execute_logs_the_command_and_returns_its_status(tmp_path):
    log = tmp_path / "log"
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(75)"
    assert sweep.execute([sys.executable, "-c", program], log) == 75
    text = log.read_text()
    assert text.startswith(f"$ {sys.executable} -c ") and {"out", "err"} <= set(text.split())
