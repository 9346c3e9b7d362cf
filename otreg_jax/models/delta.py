"""Gated DeltaNet (arXiv 2412.06464): linear attention whose state forgets, and is corrected.

A head keeps a matrix S [key_dim, value_dim]. At every position

    S ← exp(g) S;  S ← S + k ⊗ β (v − kᵀ S);  o = qᵀ S

with a decay g ≤ 0, a learning rate β in (0, 1), and q, k of length 1. Whole sequences are computed
in chunks (section 3.3 there): within one by matrix products, from one to the next by the state.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from otreg_jax.models import layers

CHUNK = 64


@dataclasses.dataclass(frozen=True)
class DeltaHeads:
    """Heads of queries and keys, each of which serves several of values; conv_width: positions
    that the convolution before them sees."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int


class DeltaNet(nn.Module):
    """The layer as in Qwen3.5: a causal convolution of q, k and v, and a gate on the normed output.

    Called on x [B, L, D], which positions hold something (bool [B, L], None: all) and a cache,
    {"conv" [layers, B, conv_width - 1, C], "state" [layers, B, key_dim, H, value_dim]} or None, of
    which it reads and writes its `layer`. Sequences are right-padded. A sequence of one position
    goes on from the cache, a longer one begins anew.
    """

    heads: DeltaHeads
    norm_eps: float
    dtype: str
    out_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BLD, valid_BL, cache, layer):
        h, dtype = self.heads, self.dtype
        keys, values = h.num_key_heads * h.key_dim, h.num_value_heads * h.value_dim
        dense = lambda name, size: layers.Dense(size, dtype=dtype, name=name)(x_BLD)
        qkv_BLC, gate_BLV = dense("qkv", 2 * keys + values), dense("gate", values)
        beta_BLH = jax.nn.sigmoid(dense("beta", h.num_value_heads).astype(jnp.float32))
        rate_H = self.param("rate", _init_rate, (h.num_value_heads,)).astype(jnp.float32)
        bias_H = self.param("rate_bias", nn.initializers.ones, (h.num_value_heads,))
        g_BLH = dense("decay", h.num_value_heads).astype(jnp.float32)
        g_BLH = jax.nn.softplus(g_BLH + bias_H.astype(jnp.float32)[None, None])
        g_BLH = -jnp.exp(rate_H)[None, None] * g_BLH
        if valid_BL is not None:  # what is not there changes no state
            g_BLH, beta_BLH = (jnp.where(valid_BL[..., None], x, 0) for x in (g_BLH, beta_BLH))

        is_step = cache is not None and x_BLD.shape[1] == 1
        before = h.conv_width - 1
        seen_BNC = jnp.pad(qkv_BLC, ((0, 0), (before, 0), (0, 0)))
        if is_step:
            seen_BNC = jnp.concatenate([cache["conv"][layer].astype(dtype), qkv_BLC], axis=1)
        weight = self.param("conv", _init_conv, (h.conv_width, 1, seen_BNC.shape[-1]))
        weight, inputs_BNC = (x.astype(jnp.float32) for x in (weight, seen_BNC))
        mixed_BLC = sum(
            inputs_BNC[:, i : i + x_BLD.shape[1]] * weight[i][None] for i in range(h.conv_width)
        )
        q, k, v = jnp.split(jax.nn.silu(mixed_BLC), (keys, 2 * keys), axis=-1)
        q, k = (self._unit(x) for x in (q, k))
        v = v.reshape(*v.shape[:2], h.num_value_heads, h.value_dim)
        if is_step:
            one = [x[:, 0] for x in (q, k, v, g_BLH, beta_BLH)]
            o_BLHv, state = step(*one, cache["state"][layer])
            o_BLHv = o_BLHv[:, None]
        else:
            o_BLHv, state = chunked(q, k, v, g_BLH, beta_BLH)
        if cache is not None:
            length_B = jnp.full(len(x_BLD), x_BLD.shape[1])
            if valid_BL is not None and not is_step:
                length_B = valid_BL.sum(axis=1)
            last_BN = length_B[:, None] + jnp.arange(before)[None]
            last = jnp.take_along_axis(seen_BNC, last_BN[..., None], axis=1)
            new = {"conv": last, "state": state}
            cache = {n: x.at[layer].set(new[n].astype(x.dtype)) for n, x in cache.items()}
        o_BLHv = layers.RMSNorm(self.norm_eps, 0.0, "float32", name="norm")(o_BLHv)
        o_BLV = o_BLHv.reshape(*o_BLHv.shape[:2], values)
        o_BLV = (o_BLV * jax.nn.silu(gate_BLV.astype(jnp.float32))).astype(dtype)
        out = layers.Dense(x_BLD.shape[-1], False, self.out_init, dtype, name="o")
        return out(o_BLV), cache

    def _unit(self, x_BLK):
        """Heads of length 1, as many as of values, float32."""
        h = self.heads
        x = x_BLK.reshape(*x_BLK.shape[:2], h.num_key_heads, h.key_dim)
        x = x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-6)
        return jnp.repeat(x, h.num_value_heads // h.num_key_heads, axis=2)


def _init_rate(key, shape, dtype=jnp.float32):
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))


def _init_conv(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * shape[0] ** -0.5


def _dot(equation: str, *args: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *args, precision=jax.lax.Precision.HIGHEST)


def step(q_BHk, k_BHk, v_BHv, g_BH, beta_BH, state_BkHv):
    """The rule at one position, float32: (o [B, H, v], the state after it)."""
    state = state_BkHv * jnp.exp(g_BH)[:, None, :, None]
    new_BHv = beta_BH[..., None] * (v_BHv - _dot("bhk,bkhv->bhv", k_BHk, state))
    state = state + _dot("bhk,bhv->bkhv", k_BHk, new_BHv)
    return _dot("bhk,bkhv->bhv", q_BHk, state) * q_BHk.shape[-1] ** -0.5, state


def chunked(q_BLHk, k_BLHk, v_BLHv, g_BLH, beta_BLH, size: int = CHUNK):
    """The rule over whole sequences, float32: (o [B, L, H, v], the state after the last position).

    Within a chunk the corrections u = β (v − kᵀ S) solve one triangular system, whose right sides
    are known but for the state at its start: u = u₀ − W S.
    """
    batch, length, heads, key_dim = k_BLHk.shape
    size = min(size, length)

    def chunks(x):  # [B, L, H, …] to [N, B, H, size, …]
        pad = [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad).reshape(batch, -1, size, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    q, k, v, g, beta = map(chunks, (q_BLHk * key_dim**-0.5, k_BLHk, v_BLHv, g_BLH, beta_BLH))
    total = jnp.cumsum(g, axis=-1)
    lower = jnp.tril(jnp.ones((size, size), bool))[None, None, None]
    # From position j to i; where j > i, the exponent could overflow.
    decay = jnp.exp(jnp.where(lower, total[..., :, None] - total[..., None, :], -jnp.inf))
    system = beta[..., None] * _dot("nbhik,nbhjk->nbhij", k, k) * decay
    right = jnp.concatenate([v, k * jnp.exp(total)[..., None]], axis=-1) * beta[..., None]
    solved = jax.lax.linalg.triangular_solve(
        system, right, left_side=True, lower=True, unit_diagonal=True
    )
    u, w = jnp.split(solved, (v.shape[-1],), axis=-1)
    inside = _dot("nbhik,nbhjk->nbhij", q, k) * decay
    q = q * jnp.exp(total)[..., None]
    k = k * jnp.exp(total[..., -1:] - total)[..., None]

    def one(state, chunk):
        q, k, u, w, inside, end = chunk
        u = u - _dot("bhik,bhkv->bhiv", w, state)
        o = _dot("bhik,bhkv->bhiv", q, state) + _dot("bhij,bhjv->bhiv", inside, u)
        state = state * jnp.exp(end)[..., None, None] + _dot("bhik,bhiv->bhkv", k, u)
        return state, o

    state = jnp.zeros((batch, heads, key_dim, v.shape[-1]), jnp.float32)
    state, o = jax.lax.scan(one, state, (q, k, u, w, inside, total[..., -1]))
    o = jnp.moveaxis(o, (0, 2), (1, 3)).reshape(batch, -1, heads, v.shape[-1])
    return o[:, :length], jnp.moveaxis(state, 1, 2)
