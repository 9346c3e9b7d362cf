"""Low-rank adaptation (LoRA, arXiv 2106.09685) of any Dense kernel, chosen by path.

A low-rank pair is two more leaves beside a kernel, `lora_a` [in, r] and `lora_b` [r, out], which
`layers.Dense` adds to it where they are present. There is no separate scale alpha/r: it is part of
`lora_a`, so nothing is left to forget when merging.
"""

import re
import zlib

import jax
import jax.numpy as jnp
from flax import traverse_util

PAIR = ("lora_a", "lora_b")


def add(params: dict, pattern: str, rank: int, key: jax.Array, scale: float = 1.0) -> dict:
    """Params with a float32 low-rank pair beside every kernel whose path matches `pattern` whole.

    The pair starts as no change: lora_a ~ N(0, scale²/in), lora_b = 0. Each pair's draw depends on
    `key` and its own path only. Paths read "llm/layers/attn/q/kernel".

    Raises ValueError when nothing matches, or a match is not the kernel of a Dense.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = [path for path in flat if re.fullmatch(pattern, path)]
    if not chosen:
        raise ValueError(f"lora: no parameter matches {pattern!r}; there are e.g. {list(flat)[:5]}")
    # A kernel of the scanned layers has a leading layer axis; any other one is a plain matrix.
    wrong = [
        path
        for path in chosen
        if not path.endswith("/kernel") or flat[path].ndim != (3 if "/layers/" in f"/{path}" else 2)
    ]
    if wrong:
        raise ValueError(f"lora: {pattern!r} matches what is no Dense kernel: {', '.join(wrong)}")
    for path in chosen:
        *stack, width_in, width_out = flat[path].shape
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        draw = jax.random.normal(leaf_key, (*stack, width_in, rank))
        parent = path.removesuffix("kernel")
        flat[f"{parent}lora_a"] = draw * scale * width_in**-0.5
        flat[f"{parent}lora_b"] = jnp.zeros((*stack, rank, width_out))
    return traverse_util.unflatten_dict(flat, sep="/")


def strip(params: dict) -> dict:
    """Params without their low-rank pairs: the model as it was before LoRA."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({p: x for p, x in flat.items() if p[-1] not in PAIR})


def merge(params: dict) -> dict:
    """Params with every pair folded into its kernel; those kernels are float32, for a narrower
    dtype would round most of a small change away (see `rounded_away`)."""
    flat = traverse_util.flatten_dict(params)
    merged = traverse_util.flatten_dict(strip(params))
    for parent in _pairs(flat):
        kernel = merged[(*parent, "kernel")].astype(jnp.float32)
        merged[(*parent, "kernel")] = kernel + _change(flat, parent)
    return traverse_util.unflatten_dict(merged)


def rounded_away(params: dict, dtype: str) -> float:
    """How much of the pairs' change is lost when merged kernels are rounded to `dtype`: the norm of
    the rounding relative to that of the change, over all kernels; 0 without pairs."""
    flat = traverse_util.flatten_dict(params)
    lost, change = 0.0, 0.0
    for parent in _pairs(flat):
        delta = _change(flat, parent)
        kernel = flat[(*parent, "kernel")].astype(jnp.float32) + delta
        rounding = kernel.astype(dtype).astype(jnp.float32) - kernel
        lost += float(jnp.square(rounding).sum())
        change += float(jnp.square(delta).sum())
    return (lost / change) ** 0.5 if change else 0.0


def _pairs(flat: dict) -> list[tuple]:
    """The paths of the modules that hold a pair."""
    return [path[:-1] for path in flat if path[-1] == "lora_a"]


def _change(flat: dict, parent: tuple) -> jax.Array:
    """What a pair adds to its kernel, float32."""
    a, b = (jnp.asarray(flat[(*parent, leaf)], jnp.float32) for leaf in PAIR)
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
