"""What several benchmarks share: model shapes, a training step of them, a random batch, a
description of the machine."""

import functools
import importlib.metadata
import json
import os
import platform
import runpy
from pathlib import Path

import jax
import numpy as np

from otreg_jax import aot, build, optim, sharding, train_step

SHAPES = Path(__file__).with_name("shapes")  # directories with a config.json, no weights


# name: (encoder, LLM, batch size, seconds of audio, transcript tokens)
SIZES = {
    "nano": ("whisper-nano", "qwen2-nano", 2, 1.0, 8),  # to rehearse with
    "quickstart": None,  # configs/quickstart.py
    "60m": ("whisper-tiny", "qwen2-60m", 8, 8.0, 32),
    "0.5b": ("whisper-small", "qwen2.5-0.5b", 16, 15.0, 64),
    "1.5b": ("whisper-large-v3", "qwen2.5-1.5b", 16, 15.0, 64),
    "7b": ("whisper-large-v3", "qwen2.5-7b", 16, 15.0, 64),
}


def whisper_shape(name: str, **changes) -> dict:
    """The configuration of an encoder of SHAPES, for transformers. It makes a decoder too, which is
    not used: as small as can be, its heads dividing the width."""
    shape = json.loads((SHAPES / name / "config.json").read_text())
    return shape | {"decoder_layers": 1, "decoder_attention_heads": 1} | changes


def recipe(size: str, arm: str = "otreg", attention: str = "auto", **changes):
    """(config, mel frames, tokens) of a size; `batch` and `seconds` may be changed.

    arm: the losses of the recipe; "ctc": less OTReg; "ce": cross-entropy alone.
    """
    if SIZES[size] is None:
        config = runpy.run_path("configs/quickstart.py")["get_config"](
            "ce" if arm == "ce" else "otreg"
        )
        config.otreg.weight *= arm == "otreg"
        config.batch_size = changes.get("batch", config.batch_size)
        return config, round(100 * changes.get("seconds", 3.0)), 12
    encoder, llm, batch, seconds, tokens = SIZES[size]
    get_config = runpy.run_path("configs/librispeech.py")["get_config"]
    config = get_config("baseline" if arm == "ce" else "otreg")
    config.otreg.weight *= arm == "otreg"
    config.otreg.start_step = config.otreg.ramp_steps = 0
    config.encoder.path, config.llm.path = str(SHAPES / encoder), str(SHAPES / llm)
    config.data.num_mels = json.loads((SHAPES / encoder / "config.json").read_text())[
        "num_mel_bins"
    ]
    config.data.augment.time_masks = config.data.augment.freq_masks = 0
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.remat, config.attention = "none", attention
    if jax.default_backend() == "cpu":
        config.compute_dtype = "float32"  # CPUs compute in bfloat16 slowly
    config.batch_size = changes.get("batch", batch)
    return config, round(100 * changes.get("seconds", seconds)), tokens


def make_step(config, frames: int, tokens: int):
    """(step, state, frozen, batch), weights random: state, metrics = step(state, frozen, batch)."""
    mesh = sharding.make_mesh(config)
    slm = aot.modules_of(config, mesh)
    init = lambda: build.split(build.init_params(slm, config), config)
    shapes = jax.eval_shape(init)
    params, frozen = jax.jit(init, out_shardings=sharding.tree_shardings(shapes, mesh))()
    optimizer = optim.make_optimizer(config)
    abstract = train_step.abstract_state(params, optimizer, mesh)
    state = jax.jit(functools.partial(train_step.init_state, optimizer=optimizer))(params)
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))
    batch = make_batch(config, frames, tokens, slm.llm.config.vocab_size)
    step = train_step.make_step(slm, config, optimizer, abstract)
    return step, state, frozen, sharding.to_global(batch, mesh)


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
