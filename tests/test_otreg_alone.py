"""otreg.py is a file to copy: it needs jax alone, other solvers only when asked for them."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import otreg_jax

PACKAGE = pathlib.Path(otreg_jax.__file__).parent
README = (PACKAGE.parent / "README.md").read_text()

BATCH = """
import numpy as np
rng = np.random.default_rng(0)
speech, text = rng.normal(size=(2, 9, 8)), rng.normal(size=(2, 4, 8))
speech, text = speech.astype(np.float32), text.astype(np.float32)
speech_mask, text_mask = np.ones((2, 9), bool), np.ones((2, 4), bool)
cross_entropy, weight = 1.0, 0.5
"""


def run(code: str, folder) -> str:
    """What a fresh Python prints that finds modules in `folder`, not in this project."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True,
        env={"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_method_loads_neither_ott_nor_equinox():
    code = """
import sys
before = set(sys.modules)
import jax, jax.numpy
with_jax = set(sys.modules)
import otreg_jax.otreg
print(sorted({name.partition(".")[0] for name in set(sys.modules) - with_jax}))
"""
    loaded = eval(run(code, PACKAGE.parent))
    assert set(loaded) <= {"otreg_jax", *sys.stdlib_module_names}, loaded


@pytest.mark.parametrize("place", ["alone", "in a package"])
def test_a_copy_runs_the_readmes_lines_without_this_project(tmp_path, place):
    """Its companions, copied beside it, are found wherever that is."""
    folder = tmp_path if place == "alone" else tmp_path / "my_trainer"
    folder.mkdir(exist_ok=True)
    shutil.copy(PACKAGE / "otreg.py", folder)
    snippet = re.search(r"```python\nfrom otreg_jax import otreg\n(.*?)```", README, re.S)[1]
    imported = "import otreg" if place == "alone" else "from my_trainer import otreg"
    block = 'import sys\nsys.modules["otreg_jax"] = None  # cannot be imported\n'
    program = block + imported + BATCH + snippet + "print(float(loss))\n"
    default = float(run(program, tmp_path))
    assert 1 < default < 2

    ask = 'text_mask, backend="{}", epsilon'
    missing = program.replace("text_mask, epsilon", ask.format("pallas")).replace(
        "out = ", "try:\n    out = "
    )
    missing = missing.partition("loss =")[0] + "\nexcept ImportError as error:\n    print(error)\n"
    assert "'pallas' needs the file sinkhorn/pallas.py beside otreg.py" in run(missing, tmp_path)

    shutil.copytree(PACKAGE / "sinkhorn", folder / "sinkhorn")
    for backend in ("pallas", "ott"):
        found = run(program.replace("text_mask, epsilon", ask.format(backend)), tmp_path)
        assert abs(float(found) - default) < 1e-5
