"""Rotary positions (RoPE, arXiv 2104.09864), and how models stretched them to longer contexts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model stretched its rotary frequencies to a longer context.

    kind: "linear" divides all by `factor`; "llama3" divides only the slow ones, blending between
    the wavelengths original_length / high_freq_factor and original_length / low_freq_factor;
    "yarn" (arXiv 2309.00071) blends by rotations over original_length and scales the rotation by
    `attention_factor`; "longrope" (arXiv 2402.13753) divides each pair's by its own of
    `short_factors`, up to original_length, and scales likewise. `long_factors` beyond it are only
    kept: longer sequences are refused.
    share: "proportional" turns this share of the pairs, the fast ones, and divides by `factor`.
    query_beta: queries at position p are multiplied by 1 + beta · log(1 + ⌊p / original_length⌋),
      as Ministral 3's are.
    """

    kind: str
    factor: float
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    share: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    query_beta: float = 0.0


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, float]:
    """Angle per position of each of the head_dim/2 pairs, float32, and the rotation's gain."""
    if theta == math.inf:
        return np.zeros(head_dim // 2, np.float32), 1.0
    powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = 1.0 / np.float32(theta) ** powers
    if scaling is None:
        return freqs, 1.0
    slowed = freqs / np.float32(scaling.factor)
    if scaling.kind == "proportional":
        turned = np.arange(head_dim // 2) < int(scaling.share * head_dim // 2)
        return np.where(turned, slowed, np.float32(0)), 1.0
    if scaling.kind == "linear":
        return slowed, 1.0
    if scaling.kind == "longrope":
        return freqs / np.asarray(scaling.short_factors, np.float32), scaling.attention_factor
    if scaling.kind == "llama3":
        rotations = scaling.original_length * freqs / np.float32(2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((rotations - scaling.low_freq_factor) / span, 0, 1)
    elif scaling.kind == "yarn":

        def pair_turning(rotations: float) -> float:
            turns = math.log(scaling.original_length / (rotations * 2 * math.pi))
            return head_dim * turns / (2 * math.log(theta))

        low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = (high - low) or 1e-3
        keep = 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    else:
        raise ValueError(f"rope_scaling: unknown kind {scaling.kind!r} ")
    freqs = (keep * freqs + (1 - keep) * slowed).astype(np.float32)
    return freqs, scaling.attention_factor if scaling.kind == "yarn" else 1.0


def rotate(x_BLHd: jax.Array, cos_BLp: jax.Array, sin_BLp: jax.Array) -> jax.Array:
    """RoPE (arXiv 2104.09864) in the half-split layout: pair i of p is (x[i], x[i + p]); float32.
    Dimensions from 2p on stay as they are."""
    pairs = cos_BLp.shape[-1]
    a, b, rest = jnp.split(x_BLHd.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
    cos, sin = cos_BLp[:, :, None], sin_BLp[:, :, None]
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
    return rotated.astype(x_BLHd.dtype)
