"""Frozen kernels as int8 with a scale per output column: half the memory of bfloat16.

A quantized `kernel` [L, in, out] int8 has a `kernel_max` [L, out] float32 beside it, the largest
magnitude of each column, which int8 calls 127; `layers.Dense` scales its result by it, so that no
kernel is ever unpacked but the one in use. Activations and gradients stay what they are.
"""

import re

import jax
import jax.numpy as jnp
from flax import traverse_util

# The bulk of a transformer.
KERNELS = r"(^|/)layers/(\w+/)?((attn|mlp)/\w+|delta/(qkv|gate|o))/kernel$"


def to_int8(params: dict) -> dict:
    """Params with every kernel of `KERNELS` rounded to int8, unless it is that already.

    Raises ValueError when there is none.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    if not any(re.search(KERNELS, path) for path in flat):
        raise ValueError(
            "frozen_int8: no kernel of the layers of encoder or LLM is frozen; set freeze, or "
            "leave frozen_int8 off"
        )
    small = {}
    for path, leaf in flat.items():
        small |= leaf_to_int8(path, leaf)
    return traverse_util.unflatten_dict(small, sep="/")


def leaf_to_int8(path: str, leaf: jax.Array) -> dict[str, jax.Array]:
    """The one parameter or, of a kernel of `KERNELS`, the two that take its place, by path."""
    if not re.search(KERNELS, path) or leaf.dtype == jnp.int8:
        return {path: leaf}
    kernel, largest = _round(leaf)
    return {path: kernel, f"{path}_max": largest}


@jax.jit  # fused: no float32 copy of a kernel
def _round(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True)
    # A column of zeros has nothing to divide by.
    small = jnp.round(127 * (kernel / jnp.where(largest > 0, largest, 1)))
    return small.astype(jnp.int8), largest.squeeze(-2)


def is_part(path: str, leaf: jax.Array) -> bool:
    """Whether a parameter is half of a quantized kernel, whose dtype must stay."""
    return leaf.dtype == jnp.int8 or path.endswith("/kernel_max")


def from_int8(params: dict, dtype: str) -> dict:
    """Params whose quantized kernels, if any, are plain ones of `dtype` again."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in [path for path in flat if path.endswith("/kernel_max")]:
        name = path.removesuffix("_max")
        scale = flat.pop(path)[..., None, :] / 127
        flat[name] = (flat[name] * scale).astype(dtype)
    return traverse_util.unflatten_dict(flat, sep="/")
