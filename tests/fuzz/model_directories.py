"""Damaged directories of published models: config.json, weights, index, tokenizer."""

import functools
import json
import os
import random
import shutil
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import mutate
import numpy as np
import safetensors.numpy
import tokenizers
from harness import Wrong, refusal

from otreg_jax import pretrained
from otreg_jax.data import tokenization
from otreg_jax.models.llm import LLM, LLMConfig
from otreg_jax.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from otreg_jax.pretrained import save

TINY = dict(
    vocab_size=300, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)
FAMILIES = {
    "llama": LLMConfig(**TINY),
    "qwen2": LLMConfig(**TINY, family="qwen2", qkv_bias=True, tied_head=False),
    "qwen3": LLMConfig(**TINY, family="qwen3", qk_norm=True),
}
TEXTS = ["turn the red lamp on", "größer 你好", ""]


def prepare(folder: Path) -> None:
    for name, config in FAMILIES.items():
        model = LLM(config)
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        (folder / name).mkdir()
        save.save_llm(folder / name, model, params)
    encoder = SpeechEncoder(SpeechEncoderConfig(16, 2, 2, 24, num_mels=8, max_positions=20))
    params = encoder.init(jax.random.key(0), jnp.zeros((1, 8, 8)), jnp.array([8]))["params"]
    (folder / "whisper").mkdir()
    save.save_speech_encoder(folder / "whisper", encoder, params)
    _split_weights(folder / "qwen3")
    _write_tokenizer(folder / "llama")
    tokenization.train_sentencepiece(TEXTS[:2] * 9, folder / "qwen2" / "tokenizer", 60)


def _split_weights(directory: Path) -> None:
    """The weights in two files under an index."""
    whole = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(whole)
    index = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        part = dict(sorted(tensors.items())[i::2])
        safetensors.numpy.save_file(part, directory / file)
        index |= dict.fromkeys(part, file)
    whole.unlink()
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def _write_tokenizer(directory: Path) -> None:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.save(str(directory / "tokenizer.json"))
    config = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "tokenizer_class": "Llama"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def case(folder: Path, seed: int) -> str:
    rng = random.Random(seed)
    name = rng.choice([*FAMILIES, "whisper"])
    directory = folder / "bad"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(folder / name, directory)
    files = sorted(directory.iterdir())
    weights = [0.5 if file.name == "config.json" else 0.5 / len(files) for file in files]
    (file,) = rng.choices(files, weights)
    good = file.read_bytes()
    _damage(rng, file)
    outcomes = [_check_model(name, directory, file, good)]
    if any(path.name.startswith("tokenizer") for path in files):
        outcomes.append(_check_tokenizer(directory))
    return "refused" if "refused" in outcomes else "used"


def _damage(rng: random.Random, file: Path) -> None:
    data, accident = file.read_bytes(), rng.random()
    if file.suffix == ".json" and accident < 0.8:
        value = json.loads(data)
        for _ in range(rng.randint(1, 2)):
            value = mutate.of_value(rng, value)
        file.write_bytes(mutate.as_json(rng, value))
    elif accident < 0.87:
        header = 600 if file.suffix == ".safetensors" else len(data)
        file.write_bytes(mutate.of_bytes(rng, data[:header]) + data[header:])
    elif accident < 0.92:
        file.write_bytes(data[: rng.randrange(len(data))])
    else:
        file.unlink()
        if accident > 0.95:
            file.mkdir()


@functools.cache
def _known(directory: Path) -> dict:
    """The params of a good directory."""
    whisper = directory.name == "whisper"
    return (pretrained.load_speech_encoder if whisper else pretrained.load_llm)(directory)[1]


def _refused(load, directory: Path):
    """(result, None), or (None, message) if it is refused as it should be."""
    try:
        return load(directory), None
    except Exception as error:
        message = refusal(error)
        if message is None:
            raise
        if str(directory) not in message:
            raise Wrong(f"no file is named: {message}") from None
        return None, message


def _check_model(name: str, directory: Path, file: Path, good: bytes) -> str:
    whisper = name == "whisper"
    load = pretrained.load_speech_encoder if whisper else pretrained.load_llm
    found, message = _refused(load, directory)
    if message:
        return "refused"
    model, params = found
    for path, leaf in jax.tree.leaves_with_path(params):
        if not np.isfinite(leaf).all():
            raise Wrong(f"{jax.tree_util.keystr(path)} is not finite")
    if not (file.suffix == ".safetensors" and _only_values_differ(good, file.read_bytes())):
        if jax.tree.map(np.array_equal, params, _known(directory.with_name(name))) != jax.tree.map(
            lambda _: True, params
        ):
            raise Wrong("other weights than there were, and nothing is said")
    if file.name == "config.json":
        _check_config(json.loads(good), json.loads(file.read_text("utf-8")))
    return "used"


def _only_values_differ(good: bytes, bad: bytes) -> bool:
    head = 8 + int.from_bytes(good[:8], "little")
    return len(good) == len(bad) and good[:head] == bad[:head]


def _check_config(good: dict, bad: dict) -> None:
    """Raises Wrong for a number that was taken from what is none."""
    for key, value in good.items():
        new = bad.get(key)
        if type(value) in (int, float) and "token_id" not in key and new is not None:
            kinds = (int,) if type(value) is int and key not in ("rope_theta",) else (int, float)
            if type(new) not in kinds or not np.isfinite(float(new)):
                raise Wrong(f"{key} = {new!r} is used")


def _check_tokenizer(directory: Path) -> str:
    tokenizer, message = _refused(tokenization.load_tokenizer, directory)
    if message:
        return "refused"
    for line in TEXTS:
        ids = tokenizer.encode(line)
        if not all(0 <= i < tokenizer.vocab_size for i in ids):
            raise Wrong(f"tokens {ids} of {tokenizer.vocab_size}")
        tokenizer.decode(ids)
    return "used"
