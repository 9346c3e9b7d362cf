"""The package as others get it: the wheel runs outside the checkout, `otreg` says what there is."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from otreg_jax import cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOY = {
    "num_steps": 2,
    "batch_size": 4,
    "log_every": 1,
    "eval_every": 0,
    "optim.warmup_steps": 1,
    "data.num_buckets": 1,
    "synthetic.num_train": 8,
    "synthetic.num_test": 2,
    "encoder.embed_dim": 16,
    "encoder.num_heads": 2,
    "encoder.mlp_dim": 32,
    "encoder.num_layers": 1,
    "adapter.hidden_dim": 16,
    "llm.embed_dim": 16,
    "llm.num_heads": 2,
    "llm.num_kv_heads": 2,
    "llm.head_dim": 8,
    "llm.mlp_dim": 32,
    "llm.num_layers": 1,
    "llm.pretrain.num_steps": 2,
    "llm.pretrain.batch_size": 4,
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree; built in a copy, for a build leaves its traces."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("otreg_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=True
    )
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def otreg(wheel, tmp_path_factory):
    """A function of a command's arguments that runs the installed `otreg` outside the checkout, its
    dependencies those of this interpreter; it returns what is printed."""
    site, away = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("away")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", site, wheel], check=True)

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, site / "bin/otreg", *arguments],
            cwd=away,
            env=os.environ | {"PYTHONPATH": str(site), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_every_module_and_recipe(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "otreg_jax").rglob("*.py")}
    recipes = {f"otreg_jax/recipes/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert len(recipes) > 3
    assert held >= modules | recipes | {"otreg_jax/py.typed"}
    assert [name for name in held if name.endswith("licenses/LICENSE")]


def test_the_installed_package_trains_the_quickstart(otreg, tmp_path):
    assert otreg("--version") == PROJECT.get("version", cli.otreg_jax.__version__) + "\n"
    toy = [f"--config.{key}={value}" for key, value in TOY.items()]
    otreg("train", "--config=quickstart:otreg", f"--workdir={tmp_path}/run", *toy)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert "otreg" in json.loads(lines[0])  # the recipe's own loss: it is the recipe that was read
    # Its test sets too.
    assert json.loads((tmp_path / "run/config.json").read_text())["synthetic"]["conditions"]


def test_help_fits_a_screen_and_loads_nothing(capsys):
    assert cli.main(["--help"]) == cli.main([]) == 0
    shown = capsys.readouterr().out.splitlines()
    shown = shown[: len(shown) // 2]
    assert len(shown) <= 24 and max(map(len, shown)) <= 80
    assert all(f"  {name} " in "\n".join(shown) for name in cli.COMMANDS)
    code = "import sys; from otreg_jax import cli; cli.main([]); print('absl' in sys.modules)"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed.endswith("False\n")


def test_commands_are_found_and_a_mistyped_one_is_named_with_its_neighbour(capsys):
    assert cli.main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs/configuration.md").read_text()
    assert cli.main(["transribe"]) == 2
    assert "(did you mean 'transcribe'?)" in capsys.readouterr().err
    assert cli.main(["align"]) == 2
    assert capsys.readouterr().err.endswith("try: otreg align --help\n")


def test_the_command_reference_is_that_of_the_commands():
    assert (ROOT / "docs/commands.md").read_text() == cli.as_markdown() + "\n", (
        "run python -m otreg_jax.cli --markdown > docs/commands.md"
    )


def test_what_is_tested_together_is_within_the_bounds():
    """requirements*.txt pin all that pyproject.toml asks for, within its bounds."""
    pins = {}
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            if "==" in line:
                pin = Requirement(line.partition("#")[0])
                pins[_plain(pin.name)] = next(iter(pin.specifier)).version
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["dev"], *extras["gcs"]]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pins[_plain(requirement.name)]), requirement


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
