"""What several benchmarks share: model shapes, a random batch, a description of the machine."""

import importlib.metadata
import os
import platform
from pathlib import Path

import jax
import numpy as np

SHAPES = Path(__file__).with_name("shapes")  # directories with a config.json, no weights


def make_batch(config, frames: int, tokens: int, vocab_size: int, seed: int = 0) -> dict:
    """Random utterances, the first of full length, the others from half of it on."""
    rng = np.random.default_rng(seed)
    rows = config.batch_size
    lengths = lambda most: np.r_[most, rng.integers(most // 2, most + 1, rows - 1)].astype(np.int32)
    return {
        "mel": rng.normal(size=(rows, frames, config.data.num_mels)).astype(np.float32),
        "mel_length": lengths(frames),
        "tokens": rng.integers(0, vocab_size, (rows, tokens)).astype(np.int32),
        "token_length": lengths(tokens),
        "index": np.arange(rows, dtype=np.int32),
    }


def describe_machine(*packages: str) -> dict:
    """The device, the host, and the versions of `packages` beside JAX's."""
    packages = ("jax", "jaxlib", *packages)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
