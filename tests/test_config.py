"""Configurations: every recipe parses, flags work, every mistake is one clear line."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest
from toy import toy_config

from otreg_jax import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.py"))


def load_recipe(path, arm=""):
    module = runpy.run_path(str(path))
    return module["get_config"](*([arm] if arm else [])), module


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_and_arm_parses_and_survives_saving(path, tmp_path):
    _, module = load_recipe(path)
    for arm in module.get("ARMS", ("",)):
        config, _ = load_recipe(path, arm)
        known = config_lib.flatten(config_lib.default())
        unknown = {key for key in config_lib.flatten(config) if key not in known}
        assert all(key.startswith(("synthetic.", "stages.", "tasks.")) for key in unknown)
        with config.unlocked():
            config.data.train = config.data.train or "train.jsonl"
        config_lib.check(config)
        config_lib.save(config, tmp_path / "config.json")
        assert not config_lib.differences(config_lib.load(tmp_path / "config.json"), config)
    assert "python -m otreg_jax.train --config=configs/" in module["__doc__"]
    with pytest.raises(ValueError, match="no such arm"):
        load_recipe(path, "nonsense")


def run_train(*args):
    """(exit code, output) of the training command."""
    command = [sys.executable, "-m", "otreg_jax.train", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_a_mistyped_key_is_named_with_its_neighbour():
    code, output = run_train(
        "--config=configs/manifest.py",
        "--workdir=x",
        "--config.otreg.wieght=1",
        "--config.data.trian=a",
    )
    assert code == 2
    assert "--config.otreg.wieght: unknown key (did you mean 'otreg.weight'?)" in output
    assert "--config.data.trian: unknown key (did you mean 'data.train'?)" in output
    assert "Traceback" not in output


def test_a_missing_recipe_is_one_line(tmp_path):
    code, output = run_train("--config=configs/nope.py", f"--workdir={tmp_path}")
    assert code != 0 and "configs/nope.py" in output
    assert "Traceback" not in output


def test_help_says_what_to_type():
    _, output = run_train("--help")
    assert "python -m otreg_jax.train --config=configs/quickstart.py --workdir=" in output


def test_check_lists_every_problem_at_once():
    config = toy_config(
        num_steps=10,
        otreg__start_step=10,
        otreg__layer=2,
        compute_dtype="float16",
        prompt="no speech",
        otreg__center="median",
        otreg__epsilon=0.0,
    )
    with pytest.raises(ValueError) as error:
        config_lib.check(config)
    parts = ("data.train", "start_step=10", "otreg.layer=2", "float16", "{speech}", "'median'")
    for part in (*parts, "epsilon=0.0"):
        assert part in str(error.value)


def test_what_may_change_on_resume():
    stored, now = toy_config(), toy_config()
    now.num_steps, now.mesh.data = 99, 4
    assert config_lib.differences(stored, now) == []
    now.otreg.weight = 1.0
    now.data.train = "other.jsonl"
    assert config_lib.differences(stored, now) == [
        "data.train: '' -> 'other.jsonl'",
        "otreg.weight: 0.0 -> 1.0",
    ]


def test_a_recipe_that_cannot_be_loaded_is_one_line(tmp_path):
    """The user's own file: its line, not a trace."""
    (tmp_path / "sibling.py").write_text("")
    for name, content, messages in (
        ("relative", "from . import sibling\n", ("line 1", "ImportError", "runpy.run_path(")),
        ("beside", "import os\nimport sibling\n", ("line 2", "'sibling'", "runpy.run_path(")),
        ("absent", "import nothing_like_it\n", ("line 1", "'nothing_like_it'")),
        ("typo", "def get_config():\n    return c\n", ("line 2", "NameError")),
        ("syntax", "def get_config(:\n", ("SyntaxError", "line 1")),
        ("empty", "", ("KeyError", "get_config")),
    ):
        path = tmp_path / f"{name}.py"
        path.write_text(content)
        with pytest.raises(ValueError) as error:
            config_lib.load_recipe(str(path))
        line = str(error.value)
        assert line.startswith(str(path)) and "\n" not in line
        assert all(message in line for message in messages), line
    path = tmp_path / "relative.py"
    code, output = run_train(f"--config={path}", f"--workdir={tmp_path}")
    assert code == 2 and output.startswith(f"error: {path}, line 1: ImportError")
    assert "Traceback" not in output


def test_a_stored_configuration_is_whole_or_named(tmp_path):
    path = tmp_path / "config.json"
    config_lib.save(toy_config(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    whole = path.read_text()
    for content in ("", whole[:100], "[]", "1", '{"seed": 0', "\x00" * 20):
        path.write_text(content)
        with pytest.raises(ValueError, match="config.json.* damaged"):
            config_lib.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="config.json.* damaged"):
        config_lib.load(path)
    stored = json.loads(whole)
    del stored["ctc"], stored["remat"], stored["synthetic"]  # of a version before there were these
    path.write_text(json.dumps(stored))
    assert config_lib.load(path).to_dict() == toy_config().to_dict()
    stored |= {"sead": 1, "num_steps": "many", "otreg": {"weight": [1]}}
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError) as error:
        config_lib.load(path)
    assert "sead: unknown to this version of otreg_jax (did you mean 'seed'?)" in str(error.value)
    assert "num_steps='many': must be an integer" in str(error.value)
    assert "otreg.weight=[1]: must be a number" in str(error.value)


def test_the_configuration_loads_neither_solvers_nor_checkpoints():
    heavy = "ott", "orbax", "grain", "tensorflow", "matplotlib", "transformers"
    command = f"import sys, otreg_jax.config; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
