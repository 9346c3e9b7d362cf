"""Configurations with one or two settings changed, as far as the traced training step."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import mutate
import numpy as np
import toy_run
from harness import Wrong, refusal

from otreg_jax import aot, preflight, rundir, settings, sharding, train
from otreg_jax import config as config_lib
from otreg_jax.data import pipeline

# They would train an LLM, speak with a synthesizer, or wait for a hub or a bucket.
LEFT_OUT = ("llm.pretrain.num_steps", "synthetic.", "stages", "mesh.")


def prepare(folder: Path) -> None:
    toy_run.write_tones(folder)


def case(folder: Path, seed: int) -> str:
    rng = random.Random(seed)
    config = toy_run.tone_config(folder / "train.jsonl")
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    if rng.random() < 0.15:
        return _stored(rng, config, folder / "config.json")
    keys = [key for key in settings.TABLE if not key.startswith(LEFT_OUT)]
    changes = {key: _value(rng, key) for key in rng.sample(keys, rng.choice([1, 1, 2]))}
    with config.ignore_type(), config.unlocked():
        for key, value in changes.items():
            *groups, name = key.split(".")
            group = config
            for part in groups:
                group = group[part]
            group[name] = value
            changes[key] = group[name]  # True is 1.0 where a float stood
    message = _run(config, workdir)
    for key, value in changes.items() if message is None else ():
        if _is_no_number(settings.TABLE[key].default, value):
            raise Wrong(f"{key}={value!r} is used")
    if message and not any(key.rpartition(".")[2] in message for key in changes):
        raise Wrong(f"none of {changes} is named: {message}")
    return "refused" if message else "used"


def _value(rng: random.Random, key: str):
    row, how = settings.TABLE[key], rng.random()
    if how < 0.3:
        return rng.choice(row.allowed.outside)
    if how < 0.45:
        return mutate.scalar(rng)
    if how < 0.5:
        return tuple(mutate.scalar(rng) for _ in range(rng.randint(0, 3)))
    default = row.default
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return rng.choice([0, 1, 2, 3, 4, 5, 7, 8, 16, 33, 64, 100, -1])
    if isinstance(default, float):
        return rng.choice([0.0, 1e-9, 0.1, 0.5, 1.0, 2.0, 10.0, 1e6, -1.0])
    if isinstance(default, tuple):
        return tuple(rng.choice([0.5, 0.9, 1.0, 1.1, 2, 3]) for _ in range(rng.randint(0, 3)))
    words = row.allowed.words.removeprefix("one of ").split(", ")
    return rng.choice([*words, "", "x", ".*", "llm/.*", "encoder/", "{speech}", "a{speech}b\n"])


def _is_no_number(default, value) -> bool:
    if type(default) is int:
        return type(value) is not int
    if type(default) is float:
        return type(value) not in (int, float) or not np.isfinite(float(value))
    return type(default) is not type(value) and default is not None


def _run(config, workdir: Path) -> str | None:
    """Goes as far as training does before it compiles. The message, if the command would end."""
    try:
        preflight.check(config)
        mesh = sharding.make_mesh(config)
        preflight.check_model(config, mesh)
        data = train.load_data(config, rundir.of(workdir))
        batches = pipeline.train_batches(
            data.train,
            data.tokenizer,
            config.data,
            batch_size=config.batch_size,
            seed=config.seed,
            num_steps=config.num_steps,
        )
        batch = next(iter(batches))
        speech = batch["mel"] if "mel" in batch else batch["audio"]
        frames = speech.shape[1] if "mel" in batch else speech.shape[1] // 160
        slm, step_of, arguments = aot.abstract_step(
            config, jax.devices(), frames, batch["tokens"].shape[1]
        )
        step_of(slm).trace(*arguments)
        return None
    except Exception as error:
        message = refusal(error)
        if message is None:
            raise
        return message


def _stored(rng: random.Random, config, path: Path) -> str:
    """A damaged config.json of a run."""
    config_lib.save(config, path)
    value = json.loads(path.read_text())
    if rng.random() < 0.5:
        path.write_bytes(mutate.as_json(rng, mutate.of_value(rng, value)))
    else:
        path.write_bytes(mutate.of_bytes(rng, path.read_bytes()))
    try:
        config_lib.check(config_lib.load(path))
    except Exception as error:
        message = refusal(error)
        if message is None:
            raise
        return "refused"
    return "used"
