"""otreg.py is a file to copy: it needs jax alone, other solvers only when asked for them."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np

import otreg_jax

PACKAGE = pathlib.Path(otreg_jax.__file__).parent
SNIPPET = re.search(
    r"```python\nfrom otreg_jax import otreg\n(.*?)```",
    (PACKAGE.parent / "README.md").read_text(),
    re.S,
)[1]

BEFORE = """
import sys
sys.modules["otreg_jax"] = None  # cannot be imported
import numpy as np
rng = np.random.default_rng(0)
speech, text = rng.normal(size=(2, 9, 8)), rng.normal(size=(2, 4, 8))
speech, text = speech.astype(np.float32), text.astype(np.float32)
speech_mask, text_mask = np.ones((2, 9), bool), np.ones((2, 4), bool)
cross_entropy, weight = 1.0, 0.5
"""


def run(code: str, folder):
    """The literal that a fresh Python prints; it finds modules in `folder`, not in this project."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def test_importing_the_method_loads_jax_alone():
    code = """
import sys, jax, jax.numpy
with_jax = set(sys.modules)
import otreg_jax.otreg
print({name.partition(".")[0] for name in set(sys.modules) - with_jax})
"""
    loaded = run(code, PACKAGE.parent)
    assert loaded <= {"otreg_jax", *sys.stdlib_module_names}, loaded


def test_a_copy_runs_the_readmes_lines_and_says_what_other_solvers_lack(tmp_path):
    shutil.copy(PACKAGE / "otreg.py", tmp_path)
    code = f"""{BEFORE}
import otreg
{SNIPPET}
try:
    otreg.regularizer(speech, text, speech_mask, text_mask, backend="pallas")
except ImportError as error:
    print((float(loss), str(error)))
"""
    loss, message = run(code, tmp_path)
    assert 1 < loss < 2
    assert "backend='pallas' needs the file sinkhorn/pallas.py beside otreg.py" in message


def test_a_copy_in_a_package_finds_the_other_solvers_beside_it(tmp_path):
    folder = tmp_path / "my_trainer"
    shutil.copytree(PACKAGE / "sinkhorn", folder / "sinkhorn")
    shutil.copy(PACKAGE / "otreg.py", folder)
    code = f"""{BEFORE}
import jax
from my_trainer import otreg
solve = jax.jit(otreg.regularizer, static_argnames="backend")
batch = speech, text, speech_mask, text_mask
print([float(solve(*batch, backend=backend).loss) for backend in otreg.BACKENDS])
"""
    losses = run(code, tmp_path)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
