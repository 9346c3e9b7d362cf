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

    All get the rank of the widest, by zeros. The pairs of kernels that lie in one tensor (Phi-3's
    qkv_proj) become one pair, of the sum of their ranks. Raises ValueError if there are none.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    held = [[row for row in rows if f"{_parent(row)}lora_a" in flat] for rows in _tensors(config)]
    held = [rows for rows in held if rows]
    checks.raise_all([] if held else ["there are no low-rank pairs to save"], str(directory))
    rank = max(sum(flat[f"{_parent(row)}lora_a"].shape[-1] for row in rows) for rows in held)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for rows in held:
        for pair, theirs in zip(_as_one(rows, flat, rank), "AB", strict=True):
            names = _names(rows[0], theirs, config.num_layers)
            pair = pair if _is_stacked(rows[0]) else pair[None]
            for name, one in zip(names, pair, strict=True):
                arrays[name] = np.ascontiguousarray(one.T)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({_module(rows[0]).rpartition(".")[2] for rows in held}),
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
    stored = safetensors.numpy.load_file(directory / WEIGHTS)
    pairs: dict[str, Any] = {}
    for rows in _tensors(config):
        for leaf, theirs in zip(lora.PAIR, "AB", strict=True):
            keys = _names(rows[0], theirs, config.num_layers)
            found = [stored.pop(key).T.astype(np.float32) for key in keys if key in stored]
            if found and len(found) < len(keys):
                problems.append(
                    f"{_parent(rows[0])}{leaf}: {len(found)} of {len(keys)} layers have it"
                )
            elif found:
                whole = np.stack(found) if _is_stacked(rows[0]) else found[0]
                for row in rows:
                    ours = factor * whole if theirs == "A" else whole[..., _outputs(row)]
                    pairs[f"{_parent(row)}{leaf}"] = jnp.asarray(ours)
    problems += [f"unexpected: {name}" for name in stored]
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


def _tensors(config: LLMConfig) -> list[list[tables.Row]]:
    """For each tensor, or its like in other layers, the rows of the kernels that lie in it."""
    tensors: dict[tuple, list[tables.Row]] = {}
    for row in tables.llm_table(config).rows:
        if row.path.endswith("/kernel"):
            tensors.setdefault((row.name, row.layers), []).append(row)
    return list(tensors.values())


def _module(row: tables.Row) -> str:
    """ "model.layers.{layer}.self_attn.q_proj" """
    return row.name.removesuffix(".weight")


def _is_stacked(row: tables.Row) -> bool:
    return "{layer}" in row.name


def _names(row: tables.Row, which: str, num_layers: int) -> list[str]:
    """The names of the pairs' halves, "A" or "B", one for each layer that the row is of."""
    numbers = (row.layers or range(num_layers)) if _is_stacked(row) else (0,)
    module = f"{_PREFIX}{_module(row)}.lora_{which}.weight"
    return [module.format(layer=number) for number in numbers]


def _parent(row: tables.Row) -> str:
    """The module of a row's kernel, "layers/attn/q/"."""
    return row.path.removesuffix("kernel")


def _outputs(row: tables.Row) -> slice:
    """Which outputs of its tensor a row's kernel gives."""
    return slice(row.part.start, row.part.stop) if row.part else slice(None)


def _as_one(rows: list[tables.Row], flat: dict, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The pair of a tensor, ([..., in, rank], [..., rank, out]), of those of the kernels in it."""
    pairs = [[flat[f"{_parent(row)}{leaf}"] for leaf in lora.PAIR] for row in rows]
    (a, b), part = pairs[0], rows[0].part
    whole_a = np.zeros((*a.shape[:-1], rank), np.float32)
    whole_b = np.zeros((*b.shape[:-2], rank, part.total if part else b.shape[-1]), np.float32)
    start = 0
    for row, (a, b) in zip(rows, pairs, strict=True):
        own = slice(start, start + a.shape[-1])
        whole_a[..., own] = np.asarray(a, np.float32)
        whole_b[..., own, _outputs(row)] = np.asarray(b, np.float32)
        start = own.stop
    return whole_a, whole_b
