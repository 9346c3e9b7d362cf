"""A few mutated inputs of every kind; `python tests/fuzz/run.py` takes thousands."""

import harness
import pytest
import run


@pytest.mark.parametrize(
    "kind, number",
    [
        ("manifests", 200),
        ("audio_files", 150),
        ("model_directories", 12),
        ("configurations", 8),
        pytest.param("run_directories", 12, marks=pytest.mark.slow),
    ],
)
def test_every_input_is_used_rightly_or_named(kind, number, tmp_path):
    counts, failures = harness.run({kind: number}, str(tmp_path), seed=100_000)
    assert failures == []
    assert counts[kind]["used"]
    # A damaged run is used too: by its checkpoint before.
    assert counts[kind]["refused"] or kind == "run_directories"
    assert kind in run.NUMBERS and kind in harness.table(counts)
