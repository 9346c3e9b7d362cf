"""A run directory: whole files, files that grow on a full disk, damaged files in one line."""

import json
import math
import os
import resource
from pathlib import Path

import pytest

from otreg_jax import rundir


def strict(text: str):
    """JSON as the standard has it: without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_local_and_remote_directories_hold_the_same_files():
    local, remote = rundir.of("runs/a"), rundir.of("gs://bucket/runs/a")
    assert str(local.results) == "runs/a/eval/results.json"
    assert str(remote.results) == "gs://bucket/runs/a/eval/results.json"
    assert str(local.checkpoints) == f"{os.getcwd()}/runs/a/checkpoints"
    assert str(remote.checkpoints) == "gs://bucket/runs/a/checkpoints"
    assert [local.skipped(process).name for process in (0, 3)] == [
        "skipped.jsonl",
        "skipped-3.jsonl",
    ]
    assert rundir.checkpoint_steps(local) == []


def test_numbers_that_are_not_finite_are_null():
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "नमस्ते"}
    assert strict(rundir.dumps(value)) == {
        "a": None,
        "b": [1.5, None, {"c": [None, 2]}],
        "d": "नमस्ते",
    }


def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "made" / "config.json"
    rundir.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*config.json"):
        rundir.write_json(path, {"a": 2})
    assert rundir.read_json(path, "") == {"a": 1}
    assert [item.name for item in path.parent.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"config.json:1: damaged, empty; mend it"),
        (b'{\n "a": 1,\n', r"config.json:3: damaged, not JSON \(Expecting .*\); mend it"),
        (b"[1, 2]", r"config.json:1: damaged, not a JSON object; mend it"),
        (b'{"a": "\xff"}', r"config.json: damaged, byte 7 is no UTF-8 text; mend it"),
        (b"[" * 10**5, r"config.json:1: damaged, nested too deeply; mend it"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_place(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        rundir.read_json(path, "mend it")
    assert "\n" not in str(error.value)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: damaged, a folder, not a file; mend it"):
        rundir.read_json(tmp_path, "mend it")


def test_lines_are_read_up_to_one_that_was_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert rundir.read_lines(path, "") == []
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "id": "a\u2028b"}\n{"step": 3, "lo')
    first, second = rundir.read_lines(path, "")  # NaN: how it was written once
    assert math.isnan(first["loss"]) and second == {"step": 2, "id": "a\u2028b"}
    path.write_text('{"step": 1}\n{"step": 2')
    assert rundir.read_lines(path, "") == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: damaged, .*; delete this line"):
        rundir.read_lines(path, "delete this line")


def test_a_full_disk_loses_nothing_of_a_growing_file(tmp_path, caplog):
    """A limit on the size of files ends a write in its middle, as a full disk does."""
    path = tmp_path / "metrics.jsonl"
    file = rundir.Appended(path, b"kept\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12, hard))
        for line in (b"one\n", b"two\n", b"three\n"):
            file.add(line)
        during = path.read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert during == b"kept\none\n"
    assert caplog.text.count("cannot be written") == 1 and "the run goes on" in caplog.text
    file.add(b"four\n")
    assert path.read_bytes() == b"kept\none\ntwo\nthree\nfour\n"


def test_a_growing_file_begins_anew_and_survives_its_removal(tmp_path):
    path = tmp_path / "made" / "partial.jsonl"
    rundir.Appended(path, b"old\n")
    file = rundir.Appended(path, b"new\n")
    assert path.read_bytes() == b"new\n"
    os.remove(path)
    file.add(b"more\n")
    assert path.read_bytes() == b"more\n"


def test_no_other_module_spells_a_run_s_file_names():
    files = rundir.of("x")
    names = {path.name for path in files if path.suffix} | {"checkpoints", "skipped.jsonl"}
    names -= {"config.json"}  # Hugging Face directories have one, too
    for path in Path(rundir.__file__).parent.rglob("*.py"):
        if path.name != "rundir.py":
            found = [name for name in names if f'"{name}"' in path.read_text()]
            assert not found, f"{path} spells {found}"
