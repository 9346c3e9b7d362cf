"""How the package is built: imports go down, files can be read in one sitting."""

import ast
import inspect

import pytest
from PIL import Image

from benchmarks import structure
from otreg_jax import train

MAX_LINES = 450
FOLDERS = ("otreg_jax", "configs", "launch", "benchmarks", "tests")


def test_imports_go_down_and_no_command_is_imported():
    assert structure.problems() == []


def test_every_entry_of_the_layers_is_there():
    found = {structure.box_of(module) for module in structure.modules()}
    assert found == {entry for layer in structure.LAYERS.values() for entry in layer}


@pytest.mark.parametrize(
    "graph, line",
    [
        ({"rundir": {"train"}}, "rundir imports train, which stands above it"),
        ({"train": {"evaluate"}}, "train imports the command evaluate"),
        (
            {"losses.ctc": {"losses.common"}, "losses.common": {"losses.ctc"}},
            "losses.ctc -> losses.common -> losses.ctc",
        ),
    ],
)
def test_wrong_imports_are_found(graph, line, monkeypatch):
    others = dict.fromkeys(set().union(*graph.values()) - graph.keys(), set())
    monkeypatch.setattr(structure, "imports", lambda: graph | others)
    assert line in structure.problems()


def test_imports_are_read_in_every_form(tmp_path, monkeypatch):
    (tmp_path / "losses").mkdir()
    sources = {
        "train.py": "import otreg_jax.build\nfrom otreg_jax import rundir, losses as l\n",
        "build.py": (
            "def f():\n    from otreg_jax.losses import ctc\n    import jax\n"
            "if __name__ == '__main__':\n    from otreg_jax import train\n"
        ),
        "rundir.py": "from otreg_jax.losses.ctc import loss\nfrom otreg_jax.losses import total\n",
        "losses/__init__.py": "",
        "losses/ctc.py": "",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(
        structure,
        "modules",
        lambda: {
            name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tmp_path / name
            for name in sources
        },
    )
    assert structure.imports() == {
        "train": {"build", "rundir", "losses"},
        "build": {"losses.ctc"},
        "rundir": {"losses.ctc", "losses"},
        "losses": set(),
        "losses.ctc": set(),
    }


def test_every_file_can_be_read_in_one_sitting():
    too_long = {
        str(path.relative_to(structure.ROOT)): lines
        for folder in FOLDERS
        for path in (structure.ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".sh")
        and (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not too_long, f"over {MAX_LINES} lines: {too_long}"


def test_the_training_loop_is_one_screen_and_a_half():
    assert len(inspect.getsource(train.train).splitlines()) < 80


def test_a_command_can_be_imported_without_parsing_anything():
    """No command looks at the command line, or defines flags, when it is imported."""
    for name in structure.COMMANDS:
        tree = ast.parse(structure.modules()[name].read_text())
        for statement in tree.body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.If):
                continue
            calls = [ast.unparse(n.func) for n in ast.walk(statement) if isinstance(n, ast.Call)]
            assert not [call for call in calls if "DEFINE" in call or "parse" in call], name


def test_the_picture_is_of_this_package():
    with Image.open(structure.PICTURE) as picture:
        drawn = picture.text["Description"].split()
    assert drawn == sorted(structure.modules()), "run python -m benchmarks.structure"
