"""A few mutated inputs of every kind; `python tests/fuzz/run.py` takes thousands."""

import harness
import pytest
import run


@pytest.mark.parametrize(
    "kind, number",
    [
        ("manifests", 200),
        ("audio_files", 150),
        ("model_directories", 20),
        ("configurations", 8),
        ("run_directories", 6),
    ],
)
def test_every_input_is_used_rightly_or_named(kind, number, tmp_path):
    counts, failures = harness.run({kind: number}, str(tmp_path), seed=100_000)
    assert failures == []
    assert counts[kind]["used"] and counts[kind]["refused"]
    assert kind in run.NUMBERS and kind in harness.table(counts)
