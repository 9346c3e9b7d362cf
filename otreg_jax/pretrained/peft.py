"""LoRA pairs of an LLM as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

PEFT computes x W + (alpha / r) x A^T B^T; here the factor is part of `lora_a` (see `models.lora`),
so what is written has alpha = r.
"""

import json
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from otreg_jax.models import lora
from otreg_jax.models.llm import LLMConfig
from otreg_jax.pretrained import checks, tables
from otreg_jax.pretrained.load import read_json, resolve

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Keys that the pairs' values are computed with, and the only values that are understood.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
    "alora_invocation_tokens": (None,),
}


def save_lora(directory: str | pathlib.Path, config: LLMConfig, params: dict) -> None:
    """Writes the pairs of an LLM's params, in float32, as `peft.PeftModel.from_pretrained` reads
    them.

    Raises ValueError if there are none, they differ in rank, or a pair's kernel is only a part of a
    tensor of the family's (Phi-3's qkv_proj).
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    rows = _rows(config)
    parents = [path.removesuffix("lora_a") for path in flat if path.endswith("/lora_a")]
    problems = [f"{path}kernel has no name of its own" for path in parents if path not in rows]
    ranks = {flat[f"{path}lora_a"].shape[-1] for path in parents}
    if len(ranks) != 1:
        problems.append(f"pairs of one rank can be saved, these have {sorted(ranks)}")
    checks.raise_all(problems, str(directory))
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for path in parents:
        for name, layer in _names(rows[path], config.num_layers):
            for leaf, theirs in zip(lora.PAIR, "AB", strict=True):
                pair = flat[f"{path}{leaf}"]
                pair = np.asarray(pair if layer is None else pair[layer], np.float32)
                arrays[f"{_PREFIX}{name}.lora_{theirs}.weight"] = np.ascontiguousarray(pair.T)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": min(ranks),
        "lora_alpha": min(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({rows[path].rpartition(".")[2] for path in parents}),
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    safetensors.numpy.save_file(arrays, directory / WEIGHTS, {"format": "pt"})


def load_lora(source: str | pathlib.Path, revision: str | None, config: LLMConfig) -> dict:
    """The pairs of a PEFT directory for an LLM: {"layers/attn/q/lora_a": float32 [L, in, r], ...}.

    Raises ValueError, listing every problem: another method than plain LoRA, tensors that are no
    pair of this LLM's kernels, or pairs that some layers lack.
    """
    directory = resolve(source, revision)
    said = checks.parsed(read_json(directory / CONFIG), str(directory / CONFIG))
    problems = [
        f"{key}={said[key]!r}: only {allowed[0]!r} is read"
        for key, allowed in _PLAIN.items()
        if key in said and said[key] not in allowed
    ]
    rank, alpha = said.get("r"), said.get("lora_alpha", 8)
    problems += checks.wrong_values(
        {"r": rank, "lora_alpha": alpha}, {"r": checks.whole(2**13), "lora_alpha": checks.NUMBER}
    )
    checks.raise_all(problems, str(directory / CONFIG))
    factor = alpha / (rank**0.5 if said.get("use_rslora") else rank)
    tensors = safetensors.numpy.load_file(directory / WEIGHTS)
    pairs: dict[str, Any] = {}
    for path, row in _rows(config).items():
        for leaf, theirs in zip(lora.PAIR, "AB", strict=True):
            names = [
                f"{_PREFIX}{name}.lora_{theirs}.weight"
                for name, _ in _names(row, config.num_layers)
            ]
            found = [tensors.pop(name).T.astype(np.float32) for name in names if name in tensors]
            if found and len(found) < len(names):
                problems.append(f"{path}{leaf}: {len(found)} of {len(names)} layers have it")
            elif found:
                scale = factor if theirs == "A" else 1.0
                stacked = np.stack(found) if "{layer}" in row else found[0]
                pairs[f"{path}{leaf}"] = jnp.asarray(scale * stacked)
    problems += [f"unexpected: {name}" for name in tensors]
    checks.raise_all(problems, str(directory / WEIGHTS))
    return pairs


def with_pairs(params: dict, pairs: dict, where: str) -> dict:
    """An LLM's params whose pairs are these.

    Raises ValueError, saying which settings would fit, if params have other pairs or another rank.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    ours = {path: x.shape for path, x in flat.items() if path.endswith(lora.PAIR)}
    if ours != {path: x.shape for path, x in pairs.items()}:
        rank = next(x.shape[-1] for path, x in pairs.items() if path.endswith("lora_a"))
        kernels = sorted(p.removesuffix("/lora_a") for p in pairs if p.endswith("/lora_a"))
        pattern = "llm/(" + "|".join(map(re.escape, kernels)) + ")/kernel"
        raise ValueError(f"{where}: set lora.rank={rank} and lora.pattern={pattern!r}")
    return traverse_util.unflatten_dict(flat | pairs, sep="/")


def _rows(config: LLMConfig) -> dict[str, str]:
    """{"layers/attn/q/": "model.layers.{layer}.self_attn.q_proj"}: each kernel's own tensor."""
    rows = tables.llm_table(config).rows
    return {
        row.path.removesuffix("kernel"): row.name.removesuffix(".weight")
        for row in rows
        if row.path.endswith("/kernel") and row.part is None
    }


def _names(name: str, num_layers: int) -> list[tuple[str, int | None]]:
    if "{layer}" not in name:
        return [(name, None)]
    return [(name.format(layer=i), i) for i in range(num_layers)]
