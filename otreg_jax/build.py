"""From a configuration to modules and weights, and from a run directory to a trained model."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from otreg_jax import checkpoint, losses, optim, pretrained, sharding, train_step
from otreg_jax import config as config_lib
from otreg_jax.data import text
from otreg_jax.models import lora
from otreg_jax.models.adapter import Adapter, AdapterConfig
from otreg_jax.models.llm import LLM, LLMConfig
from otreg_jax.models.slm import SLM
from otreg_jax.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig


class Run(NamedTuple):
    """A trained model: what a run directory holds."""

    config: ConfigDict
    slm: SLM
    params: Any  # all of them, trained and frozen, on `mesh`
    tokenizer: text.Tokenizer
    step: int
    mesh: jax.sharding.Mesh


def load_run(workdir) -> Run:
    """The newest readable checkpoint of a run directory, on all devices.

    Raises:
      FileNotFoundError: the directory holds no run, or no checkpoint yet.
      ValueError: its checkpoints cannot be read.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(
            f"{workdir}: no run here (config.json is missing); train one with "
            f"python -m otreg_jax.train --config=configs/quickstart.py --workdir={workdir}"
        )
    config = config_lib.load(workdir / "config.json")
    tokenizer = text.load_tokenizer(workdir)
    mesh = sharding.data_mesh()
    slm, params = build(config, tokenizer, llm_path(config, workdir), mesh)
    params, frozen = split(params, config)
    abstract_state = train_step.abstract_state(params, optim.make_optimizer(config), mesh)
    with checkpoint.open_checkpoints(workdir, config.keep_checkpoints) as checkpointer:
        state = checkpoint.restore(checkpointer, abstract_state, params_only=True)
    if state is None:
        raise FileNotFoundError(f"{workdir}: no checkpoint yet; let training reach one")
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    return Run(config, slm, optim.merge(state.params, frozen), tokenizer, int(state.step), mesh)


def split(params, config):
    """(trained parameters in float32, frozen ones in the compute dtype)."""
    trained, frozen = optim.split(params, config.freeze)
    as_dtype = lambda tree, dtype: jax.tree.map(lambda x: x.astype(dtype), tree)
    return as_dtype(trained, "float32"), as_dtype(frozen, config.compute_dtype)


def llm_path(config, workdir) -> str:
    """Where the LLM's weights are: `llm.path`, else WORKDIR/llm if pretrained, else "" (none)."""
    if config.llm.path or not config.llm.pretrain.num_steps:
        return config.llm.path
    return str(Path(workdir) / "llm")


def build(config, tokenizer: text.Tokenizer, llm_dir: str = "", mesh=None) -> tuple[SLM, dict]:
    """Modules and weights: pretrained where the configuration names a path, else from the seed.

    Args:
      llm_dir: a Hugging Face directory or hub id with the LLM; "" builds one from scratch.
      mesh: pretrained weights are read straight into their shards of it, if given.

    Returns:
      The SLM and {"encoder", "adapter", "llm"} (and "ctc" if that loss is on).
    """
    key = jax.random.key(config.seed)
    encoder, encoder_params = load_encoder(config, jax.random.fold_in(key, 0), mesh)
    llm_key = jax.random.fold_in(key, 1)
    llm, llm_params = load_llm(config, llm_dir, tokenizer.vocab_size, llm_key, mesh)
    adapter = Adapter(
        AdapterConfig(
            in_dim=encoder.config.embed_dim,
            out_dim=llm.config.embed_dim,
            dtype=config.compute_dtype,
            **config.adapter.to_dict(),
        )
    )
    adapter_params = _init(
        adapter, jax.random.fold_in(key, 2), jnp.zeros((1, 8, encoder.config.embed_dim)), [8]
    )
    prompt = text.build_prompt(tokenizer, config.prompt)
    params = {"encoder": encoder_params, "adapter": adapter_params, "llm": llm_params}
    if config.lora.pattern:
        lora_key = jax.random.fold_in(key, 4)
        params = lora.add(
            params, config.lora.pattern, config.lora.rank, lora_key, config.lora.scale
        )
    if config.ctc.weight:
        ctc_key = jax.random.fold_in(key, 3)
        params["ctc"] = losses.init_ctc(ctc_key, llm.config.embed_dim, config.ctc.scale)
    return SLM(encoder, adapter, llm, prompt), params


def load_encoder(config, key, mesh=None) -> tuple[SpeechEncoder, dict]:
    """The speech encoder of `config.encoder`."""
    c = config.encoder
    if c.path:
        encoder, params = pretrained.load_speech_encoder(
            c.path, c.revision or None, **_placement(config, "encoder", mesh)
        )
        if encoder.config.num_mels != config.data.num_mels:
            raise ValueError(
                f"{c.path} takes {encoder.config.num_mels} mel bins: set data.num_mels="
                f"{encoder.config.num_mels} (it is {config.data.num_mels})"
            )
        return SpeechEncoder(_compute_in(encoder.config, config)), params
    encoder = SpeechEncoder(
        SpeechEncoderConfig(
            num_mels=config.data.num_mels, embed_dim=c.embed_dim, num_layers=c.num_layers,
            num_heads=c.num_heads, mlp_dim=c.mlp_dim, max_positions=c.max_positions,
            strides=tuple(c.strides), dtype=config.compute_dtype, remat=config.remat,
        )
    )  # fmt: skip
    mel = jnp.zeros((1, 16, config.data.num_mels))
    return encoder, _init(encoder, key, mel, [16])


def load_llm(config, llm_dir: str, vocab_size: int, key, mesh=None) -> tuple[LLM, dict]:
    """The LLM in `llm_dir`, or one from scratch after `config.llm`."""
    if llm_dir:
        llm, params = pretrained.load_llm(
            llm_dir, config.llm.revision or None, **_placement(config, "llm", mesh)
        )
        if llm.config.vocab_size < vocab_size:
            raise ValueError(
                f"{llm_dir}: the LLM has {llm.config.vocab_size} tokens, its tokenizer "
                f"{vocab_size}: they do not belong together"
            )
        return LLM(_compute_in(llm.config, config)), params
    c = config.llm
    llm = LLM(
        LLMConfig(
            vocab_size=vocab_size, embed_dim=c.embed_dim, num_layers=c.num_layers,
            num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim,
            mlp_dim=c.mlp_dim, tied_head=c.tie_embeddings, dtype=config.compute_dtype,
            remat=config.remat,
        )
    )  # fmt: skip
    return llm, _init(llm, key, jnp.zeros((1, 4), jnp.int32))


def _init(module, key, *inputs):
    inputs = [jnp.asarray(x) for x in inputs]
    # Op by op, initialisation would compile hundreds of small programs.
    return jax.jit(module.init)(key, *inputs)["params"]


def _placement(config, part: str, mesh) -> dict:
    """In which dtype (a frozen part never needs float32) and shards to read a part's weights."""
    is_frozen = config.freeze and re.search(config.freeze, f"{part}/weights")
    shardings = mesh and (lambda shapes: sharding.tree_shardings({part: shapes}, mesh)[part])
    return {"dtype": config.compute_dtype if is_frozen else "float32", "shardings": shardings}


def _compute_in(module_config, config):
    return dataclasses.replace(module_config, dtype=config.compute_dtype, remat=config.remat)
