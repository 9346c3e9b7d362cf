"""The documentation site builds without a warning, and the notebook runs."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib

ROOT = Path(__file__).parent.parent


def test_the_site_builds_strictly(tmp_path):
    """Strictly: a page that the navigation lacks, a link or an anchor into nothing, ends it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "regularizer" in (tmp_path / "api/index.html").read_text()  # made from docstrings
    fetched = [
        line
        for page in tmp_path.rglob("*.html")
        for line in page.read_text().splitlines()
        if "://" in line and ("<script" in line or "<link" in line and "stylesheet" in line)
    ]
    assert not fetched  # what is read needs no network either


def test_the_notebook_runs_and_otreg_brings_speech_to_its_text():
    matplotlib.use("agg")
    notebook = json.loads((ROOT / "examples/otreg_in_your_trainer.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    names = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"code cell {number}", "exec"), names)
    cosine, mass = "cosine to what is said", "mass on what is said"
    without, with_otreg = names["results"]["without OTReg"], names["results"]["with OTReg"]
    assert with_otreg[cosine] > without[cosine] + 0.1
    assert with_otreg[mass] > 0.7
    for history in (names["history_with"], names["history_without"]):
        assert history[-1]["ce"] < history[0]["ce"]
        assert max(line["marginal_error"] for line in history) < 0.1
