"""Frozen kernels as int8 with a scale per output column: half the memory of bfloat16.

A quantized kernel `kernel` [L, in, out] int8 has a `kernel_scale` [L, out] float32 beside it, the
largest magnitude of the column / 127; `layers.Dense` multiplies its result by it, so that no kernel
is ever unpacked but the one in use. Activations and gradients stay what they are.
"""

import re

import jax.numpy as jnp
from flax import traverse_util

KERNELS = r"^(encoder|llm)/layers/(attn|mlp)/\w+/kernel$"  # the bulk of a transformer


def to_int8(params: dict) -> dict:
    """Params {"encoder": ..., "llm": ...} with every kernel of `KERNELS` rounded to int8.

    Raises ValueError when there is none.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    kernels = [path for path in flat if re.search(KERNELS, path)]
    if not kernels:
        raise ValueError(
            "frozen_int8: no kernel of the layers of encoder or LLM is frozen; set freeze, or "
            "leave frozen_int8 off"
        )
    for path in kernels:
        kernel = flat[path].astype(jnp.float32)
        scale = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True) / 127
        # A column of zeros has no scale to divide by.
        flat[path] = jnp.round(kernel / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
        flat[f"{path}_scale"] = scale.squeeze(-2)
    return traverse_util.unflatten_dict(flat, sep="/")


def from_int8(params: dict, dtype: str) -> dict:
    """Params whose quantized kernels, if any, are plain ones of `dtype` again."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in [path for path in flat if path.endswith("/kernel_scale")]:
        name = path.removesuffix("_scale")
        flat[name] = (flat[name] * flat.pop(path)[..., None, :]).astype(dtype)
    return traverse_util.unflatten_dict(flat, sep="/")
