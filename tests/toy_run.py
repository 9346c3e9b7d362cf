"""Run directories for tests: one made without training, another that trains on tones."""

import json

import fsspec.implementations.memory
import jax
import numpy as np
import soundfile

from otreg_jax import build, checkpoint, optim, sharding, train_step
from otreg_jax import config as config_lib
from otreg_jax.data import tokenization

WORDS = ("do", "re", "mi", "fa", "sol")
TEXTS = ("turn on the light", "turn off the radio", "call anna", "meet peter on monday", "stop")


def write_set(folder, count: int, *, seed: int, texts=TEXTS, lang="en"):
    """A manifest of `count` noise bursts of 0.3 to 1 s with transcripts."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        audio = rng.normal(size=int(16000 * rng.uniform(0.3, 1.0))).astype(np.float32) * 0.1
        soundfile.write(folder / f"{i}.wav", audio, 16000)
        line = {"audio_filepath": f"{i}.wav", "text": texts[i % len(texts)], "lang": lang}
        lines.append(json.dumps(line | {"duration": len(audio) / 16000, "id": f"utt-{i}"}))
    (folder / "set.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "set.jsonl"


def make_run(workdir, *, dev="", test="", seed=0, tasks=None, **changes):
    """A run directory as training leaves it at step 3, with the weights it started from; `changes`
    to the configuration are named like lora__rank."""
    workdir.mkdir(parents=True)
    config = config_lib.default()
    config.seed, config.num_steps = seed, 3
    config.data.train = config.data.dev = str(dev)
    config.data.test = test
    config.data.max_duration = 2.0
    config.encoder.update(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32, strides=(2, 2, 2))
    config.llm.update(embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)
    config.adapter.hidden_dim = 16
    config.decode.max_tokens = 6
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    with config.unlocked():
        config.tasks = tasks or {}
    tokenizer = tokenization.train_sentencepiece(
        TEXTS, workdir / "tokenizer", 60, model_type="word"
    )
    slm, params = build.build(config, tokenizer)
    # Larger than any initialisation, so that hypotheses differ.
    params["llm"] = jax.tree.map(lambda leaf: 3 * leaf, params["llm"])
    params, _ = optim.split(params, config.freeze)
    optimizer = optim.make_optimizer(config)
    state = train_step.init_state(params, optimizer)._replace(step=jax.numpy.int32(3))
    shardings = sharding.tree_shardings(state, sharding.data_mesh())
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(jax.device_put(state, shardings), 3, {})
    config_lib.save(config, workdir / "config.json")
    lines = [{"step": step, "ce": 3.0 / step, "grad_norm": 1.0} for step in (1, 2, 3)]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return workdir


def serve_buckets():
    """From now on gs:// is in this process's memory."""

    class Bucket(fsspec.implementations.memory.MemoryFileSystem):
        protocol = ("gs", "gcs")

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("gs://").removeprefix("gcs://").strip("/")

    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)


def write_tones(folder):
    """A manifest of twelve utterances: each word is a tone."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(12):
        words = rng.integers(len(WORDS), size=2 + i % 4)
        tones = [np.sin(2 * np.pi * (300 + 150 * w) * np.arange(2400) / 16000) for w in words]
        audio = np.concatenate(tones) + 0.01 * rng.normal(size=2400 * len(words))
        soundfile.write(folder / f"{i}.wav", 0.3 * audio, 16000)
        text = " ".join(WORDS[w] for w in words)
        duration = len(audio) / 16000
        lines.append({"audio_filepath": f"{i}.wav", "text": text, "duration": duration})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tone_config(manifest, **changes):
    config = config_lib.default()
    config.data.train = str(manifest)
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = 12, 8, 1, 4
    config.data.num_mels = 16
    config.tokenizer.model_type = "word"
    config.encoder.update(
        {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "strides": (2, 2)}
    )
    config.encoder.max_positions = 64
    config.adapter.hidden_dim = 16
    config.llm.update({"embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8})
    config.llm.mlp_dim = 32
    config.otreg.weight, config.otreg.start_step, config.otreg.ramp_steps = 1.0, 2, 4
    config.optim.warmup_steps = 2
    config.data.augment.update(freq_masks=1, freq_width=8)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def metrics_of(workdir):
    """{step: line of metrics.jsonl without what depends on the clock}"""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    of_clock = lambda key: key.endswith("per_sec") or key in ("time", "elapsed", "goodput")
    return {line["step"]: {k: v for k, v in line.items() if not of_clock(k)} for line in lines}


def write_recipe(folder, config):
    """A recipe file that gives exactly this configuration."""
    config_lib.save(config, folder / "recipe.json")
    path = folder / "recipe.py"
    path.write_text(
        "from otreg_jax import config\n"
        f"def get_config():\n    return config.load({str(folder / 'recipe.json')!r})\n"
    )
    return path
