"""Models and recordings in pieces: what is unpacked is what was packed."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from toy_run import write_tones

from benchmarks import carry
from otreg_jax.data import audio, manifest


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """(what was packed, the folder of its pieces)."""
    model, speech = tmp_path / "model", tmp_path / "speech"
    model.mkdir()
    speech.mkdir()
    weights = {
        "encoder.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 3,
        "decoder.weight": np.ones((2, 2), np.float32),
        "encoder.ids": np.arange(3),
    }
    safetensors.numpy.save_file(weights, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    lines = write_tones(speech).read_text().splitlines()
    lines = [json.dumps(json.loads(x) | {"lang": "en" if i else "de"}) for i, x in enumerate(lines)]
    for split in carry.SPLITS:
        (speech / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    pieces = tmp_path / "pieces"
    flags = [f"--encoder={model}", f"--llm={model}", f"--corpora=read={speech}"]
    argv = ["carry", "pack", str(pieces), *flags, "--megabytes=0.05"]
    monkeypatch.setattr("sys.argv", argv)
    carry.main()
    return speech, pieces


def test_what_is_unpacked_is_what_was_packed(tmp_path, packed, monkeypatch):
    speech, pieces = packed
    found = sorted(pieces.glob("*.piece"))
    assert len(found) > 2 and max(path.stat().st_size for path in found) <= 50_000
    monkeypatch.setattr("sys.argv", ["carry", "unpack", str(pieces), str(tmp_path / "there")])
    carry.main()
    there = tmp_path / "there"
    arrays = safetensors.numpy.load_file(there / "encoder" / "model.safetensors")
    assert set(arrays) == {"encoder.weight", "encoder.ids"}  # the decoder is left out
    assert arrays["encoder.weight"].dtype == ml_dtypes.bfloat16
    expected = (np.arange(6, dtype=np.float32).reshape(2, 3) / 3).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(arrays["encoder.weight"], expected)
    np.testing.assert_array_equal(arrays["encoder.ids"], np.arange(3))
    assert "decoder.weight" in safetensors.numpy.load_file(there / "llm" / "model.safetensors")
    for split in carry.SPLITS:
        before = manifest.read_manifest(speech / f"{split}.jsonl")[1:]  # the first is German
        after = manifest.read_manifest(there / "read" / f"{split}.jsonl")
        assert [u.text for u in after] == [u.text for u in before]
        np.testing.assert_array_equal(audio.load_audio(after[0]), audio.load_audio(before[0]))


def test_pieces_that_are_missing_or_damaged_are_all_named(tmp_path, packed, monkeypatch):
    _, pieces = packed
    (pieces / "000.piece").unlink()
    (pieces / "001.piece").write_bytes(b"x")
    monkeypatch.setattr("sys.argv", ["carry", "unpack", str(pieces), str(tmp_path / "there")])
    with pytest.raises(SystemExit, match=r"000.piece is missing\n.*001.piece is damaged"):
        carry.main()
    assert not (tmp_path / "there").exists()
