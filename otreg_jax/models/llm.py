"""A decoder-only LLM: Llama, Mistral, Qwen, Gemma, Phi, OLMo, Granite and SmolLM, told apart by
configuration.

All layers are one homogeneous block under a scan. Where layers differ (local and global attention,
two RoPE bases) the block picks its mask and its rotation by a scanned per-layer index.

Sequences are right-padded and causal, so padding needs no mask; it only has to be finite.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from otreg_jax import sharding
from otreg_jax.models import layers
from otreg_jax.models.attention import attention
from otreg_jax.models.rope import RopeScaling, rope_frequencies, rotate

Cache = dict[str, jax.Array]  # {"k", "v"}: [num_layers, B, slots, K, head_dim]


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """The shape of an LLM; the defaults are Llama's.

    family: the Hugging Face `model_type` the weights are saved as.
    dtype: what the layers compute in; the weights keep their own.
    attention: what computes it over whole sequences, see `attention.choose_kernel`; one-token steps
      are left to XLA.
    norm_offset: norms multiply by (norm_offset + scale); 1 for Gemma.
    pre_norms: norm each sublayer's input (all but OLMo 2).
    post_norms: norm each sublayer's output, before the residual sum (Gemma, OLMo 2).
    qk_norm: norm queries and keys, each head alone or, with qk_norm_whole, all together (OLMo 2).
    residual_scale: multiplies what each sublayer adds (Granite).
    logit_divisor: logits are divided by it (Granite).
    rotary_dim: dimensions of a head that are rotated, the first ones; all when None.
    attn_scale: multiplies the attention scores; head_dim**-0.5 when None.
    sliding_window: local layers attend to this many last positions, their own included.
    local_layers: for each layer whether it is local; None: all of them when there is a window.
    local_rope_theta: RoPE base of the local layers, unscaled; None: as the global ones; inf: they
      are not rotated, and without a window nothing else sets them apart (SmolLM3).
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    tied_head: bool = True
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] | None = None
    local_rope_theta: float | None = None
    max_positions: int = 2048
    family: str = "llama"
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"


def _layer_kinds(config: LLMConfig) -> np.ndarray:
    """int32 [num_layers]: 0 for a global layer, 1 for a local one."""
    local = config.local_layers
    if local is None:
        local = (config.sliding_window is not None,) * config.num_layers
    if len(local) != config.num_layers:
        raise ValueError(f"local_layers has {len(local)} entries for {config.num_layers} layers")
    return np.asarray(local, np.int32)


def _rope_tables(config: LLMConfig, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [kind, B, L, pairs], for global (0) and local (1) layers."""
    bases = [(config.rope_theta, config.rope_scaling)]
    if config.local_rope_theta is None:
        bases *= 2
    else:
        bases.append((config.local_rope_theta, None))
    cos, sin = [], []
    for theta, scaling in bases:
        freqs, gain = rope_frequencies(config.rotary_dim or config.head_dim, theta, scaling)
        angles = positions_BL[..., None].astype(jnp.float32) * freqs[None, None]
        cos.append(gain * jnp.cos(angles))
        sin.append(gain * jnp.sin(angles))
    return jnp.stack(cos), jnp.stack(sin)


def _masks(config: LLMConfig, query_BL: jax.Array, slots: int) -> jax.Array:
    """bool [kind, B, L, slots]: a query sees slots up to its own, local layers the last few."""
    behind = query_BL[..., None] - jnp.arange(slots)[None, None]
    causal = behind >= 0
    window = config.sliding_window
    return jnp.stack([causal, causal if window is None else causal & (behind < window)])


def _by_kind(config: LLMConfig, attend, kind, *qkv):
    """`attend(*qkv)`, in a local layer (kind 1) with the window where it hides anything."""
    window = config.sliding_window
    if window is None or qkv[0].shape[1] <= window:
        return attend(*qkv)
    kinds = (attend, functools.partial(attend, window=window))
    present = set(_layer_kinds(config).tolist())
    return kinds[present.pop()](*qkv) if len(present) == 1 else jax.lax.switch(kind, kinds, *qkv)


class Attention(nn.Module):
    config: LLMConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x_BLD, cache, layer, kind, tables, positions_BL):
        c = self.config
        cos_BLp, sin_BLp, mask_BLS = jax.tree.map(lambda table: table[kind], tables)
        is_step = mask_BLS is not None  # of one token
        place = lambda x, axis: sharding.to_weights(x, self.mesh, axis) if is_step else x
        x_BLD = place(x_BLD, "fsdp")

        def normed(name: str, x: jax.Array) -> jax.Array:
            return layers.RMSNorm(c.norm_eps, c.norm_offset, c.dtype, name=f"{name}_norm")(x)

        def project(name: str, heads: int) -> jax.Array:
            y = layers.Dense(heads * c.head_dim, c.qkv_bias, dtype=c.dtype, name=name)(x_BLD)
            y = place(normed(name, y) if c.qk_norm_whole and name != "v" else y, "tensor")
            return y.reshape(*y.shape[:2], heads, c.head_dim)

        q, k, v = (
            project(name, heads)
            for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads))
        )
        if c.qk_norm and not c.qk_norm_whole:
            q, k = normed("q", q), normed("k", k)
        q, k = rotate(q, cos_BLp, sin_BLp), rotate(k, cos_BLp, sin_BLp)
        if c.rope_scaling and c.rope_scaling.query_beta:
            turns_BL = (positions_BL // c.rope_scaling.original_length).astype(jnp.float32)
            gain_BL = 1 + c.rope_scaling.query_beta * jnp.log1p(turns_BL)
            q = q * gain_BL[..., None, None].astype(q.dtype)
        if cache is not None:
            # Written where it lies: a layer's cache taken out and put back is copied every step.
            slots = (layer, jnp.arange(x_BLD.shape[0])[:, None], positions_BL)
            cache = {
                name: cache[name].at[slots].set(new.astype(cache[name].dtype))
                for name, new in (("k", k), ("v", v))
            }
        scale = c.head_dim**-0.5 if c.attn_scale is None else c.attn_scale
        attend = functools.partial(attention, scale=scale, softcap=c.attn_softcap)
        if mask_BLS is None:
            causal = functools.partial(attend, is_causal=True, kernel=c.attention, mesh=self.mesh)
            y = _by_kind(c, causal, kind, q, k, v)
        else:
            k, v = cache["k"][layer], cache["v"][layer]
            y = attend(q, k.astype(q.dtype), v.astype(q.dtype), mask_BLS)
        out_init = _residual_init(c)
        o = layers.Dense(c.embed_dim, c.out_bias, out_init, c.dtype, name="o")
        y = y.reshape(*y.shape[:2], -1)
        return o(place(y, "tensor")), cache


class MLP(nn.Module):
    config: LLMConfig

    @nn.compact
    def __call__(self, x_BLD):
        c = self.config
        gate = layers.Dense(c.mlp_dim, c.mlp_bias, dtype=c.dtype, name="gate")(x_BLD)
        up = layers.Dense(c.mlp_dim, c.mlp_bias, dtype=c.dtype, name="up")(x_BLD)
        down = layers.Dense(c.embed_dim, c.mlp_bias, _residual_init(c), c.dtype, name="down")
        return down(layers.ACTIVATIONS[c.activation](gate) * up)


def _residual_init(config: LLMConfig) -> nn.initializers.Initializer:
    # The residual stream sums 2·num_layers outputs: scaling each keeps its variance (GPT-2).
    return nn.initializers.variance_scaling(0.5 / config.num_layers, "fan_in", "truncated_normal")


class Block(nn.Module):
    config: LLMConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, carry, layer, kind, is_tap, tables, positions_BL):
        c = self.config
        x_BLD, tapped, cache = carry

        def norm(name: str) -> layers.RMSNorm:
            return layers.RMSNorm(c.norm_eps, c.norm_offset, c.dtype, name=name)

        attend, mlp = Attention(c, self.mesh, name="attn"), MLP(c, name="mlp")
        if tables[2] is None:
            spread = functools.partial(sharding.over_batch, mesh=self.mesh)
        else:
            spread = functools.partial(sharding.to_weights, mesh=self.mesh, axis="fsdp")
        before = (lambda name, x: norm(name)(x)) if c.pre_norms else (lambda name, x: x)
        after = (lambda name, x: norm(name)(x)) if c.post_norms else (lambda name, x: x)

        def add(x_BLD, name: str, y_BLD):
            y_BLD = after(name, y_BLD)
            if c.residual_scale != 1:
                y_BLD = y_BLD * jnp.asarray(c.residual_scale, y_BLD.dtype)
            return spread(x_BLD + y_BLD)

        y, cache = attend(before("attn_norm", x_BLD), cache, layer, kind, tables, positions_BL)
        x_BLD = add(x_BLD, "attn_post_norm", y)
        x_BLD = add(x_BLD, "mlp_post_norm", mlp(before("mlp_norm", x_BLD)))
        tapped = tuple(jnp.where(is_tap[i], x_BLD, kept) for i, kept in enumerate(tapped))
        return (x_BLD, tapped, cache), None


class LLM(nn.Module):
    """Decoder-only language model. Call it on tokens, or use embed → hidden → logits.

    Params: embed/embedding [V, D], layers/… stacked over the layers, norm/scale [D] and, for an
    untied head, head/kernel [D, V]. `mesh`: what its activations are spread over.
    """

    config: LLMConfig
    mesh: Mesh | None = None

    def setup(self):
        c = self.config
        embed_init = nn.initializers.normal(c.embed_dim**-0.5)
        self.token_embed = nn.Embed(
            c.vocab_size, c.embed_dim, embedding_init=embed_init, name="embed"
        )
        if c.num_layers:
            # (layer, kind, is_tap) are per layer; (tables, positions) are the same for all.
            axes = (0, 0, 0, nn.broadcast, nn.broadcast)
            self.layers = layers.scanned(Block, c.num_layers, axes, c.remat)(c, self.mesh)
        self.norm = layers.RMSNorm(c.norm_eps, c.norm_offset, c.dtype)
        if not c.tied_head:
            self.head = layers.Dense(c.vocab_size, dtype=c.dtype)

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        """int32 tokens [B, L] to float32 next-token logits [B, L, V]."""
        x_BLD, _ = self.hidden(self.embed(tokens_BL))
        return self.logits(x_BLD)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Rows of the embedding table as the first layer receives them (Gemma's scale included)."""
        x_BTD = self.token_embed(tokens_BT).astype(self.config.dtype)
        if x_BTD.ndim == 3:  # not a prompt, which is the same for all rows
            x_BTD = sharding.over_batch(x_BTD, self.mesh)
        return x_BTD * jnp.asarray(self.config.embed_scale, x_BTD.dtype)

    def hidden(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Through the layers, before the final norm; [B, L, D] and the updated cache.

        A position attends to the positions before it in the sequence; `positions` (default 0, 1, …)
        only rotate. With a cache, keys and values are written to its slots `positions`, and where
        the sequence is a single position, it attends to the slots up to its own: prefill (a prompt
        at positions 0, 1, …), then steps of examples at different positions.
        """
        x_BLD, _, cache = self._run(x_BLD, positions_BL, cache, taps=())
        return x_BLD, cache

    def hidden_and_taps(
        self, x_BLD: jax.Array, taps: tuple[int, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """`hidden` without a cache, and the hidden states after the first `tap` ≥ 1 layers, for
        each of `taps`.

        The layers stay one scan: running them as two `sublayers` would copy their weights.
        """
        for tap in taps:
            if not 1 <= tap <= self.config.num_layers:
                raise ValueError(f"layer {tap}: the LLM has layers 1 to {self.config.num_layers}")
        return self._run(x_BLD, None, None, taps)[:2]

    def _run(self, x_BLD, positions_BL, cache, taps):
        c = self.config
        x_BLD = x_BLD.astype(c.dtype)
        if not c.num_layers:
            return x_BLD, (), cache
        L = x_BLD.shape[1]
        positions_BL = jnp.arange(L)[None] if positions_BL is None else positions_BL
        scaling = c.rope_scaling
        slots = L if cache is None else max(L, cache["k"].shape[2])
        if scaling and scaling.kind == "longrope" and slots > scaling.original_length:
            raise ValueError(
                f"{slots} positions: this LLM rotates otherwise beyond {scaling.original_length} "
                "(longrope), which is not computed"
            )
        is_step = cache is not None and L == 1
        masks = _masks(c, positions_BL, cache["k"].shape[2]) if is_step else None
        tables = (*_rope_tables(c, positions_BL), masks)
        carry = (x_BLD, tuple(jnp.zeros_like(x_BLD) for _ in taps), cache)
        is_tap = jnp.arange(1, c.num_layers + 1)[:, None] == jnp.array(taps)[None] if taps else None
        kinds = _layer_kinds(c)
        if self._is_for_steps():
            block = Block(c, self.mesh, parent=None)
            for layer, params in enumerate(self.variables["params"]["layers"]):
                args = carry, layer, kinds[layer], None, tables, positions_BL
                carry, _ = block.apply({"params": params}, *args)
            return carry
        index = jnp.arange(c.num_layers)
        return self.layers(carry, index, jnp.asarray(kinds), is_tap, tables, positions_BL)[0]

    def _is_for_steps(self) -> bool:
        params = self.variables.get("params", {})
        return isinstance(params.get("layers"), tuple)

    def logits(self, x_D: jax.Array) -> jax.Array:
        """Final norm, head and soft cap on hidden states [..., D]; float32 [..., V]."""
        c = self.config
        x_D = self.norm(x_D)
        if c.tied_head:
            kernel_VD = self.token_embed.embedding.astype(c.dtype)
            if self._is_for_steps():
                logits_V = layers.matmul_few_rows(x_D, kernel_VD, jnp.float32)
            else:
                logits_V = jnp.matmul(x_D, kernel_VD.T, preferred_element_type=jnp.float32)
        else:
            logits_V = self.head(x_D).astype(jnp.float32)
        if c.logit_divisor != 1:
            logits_V /= c.logit_divisor
        if c.logit_softcap is not None:
            logits_V = c.logit_softcap * jnp.tanh(logits_V / c.logit_softcap)
        return logits_V


def init_cache(config: LLMConfig, batch: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache of `length` slots (slot = position) in `dtype`, or in the compute dtype."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return {name: jnp.zeros(shape, dtype or config.dtype) for name in ("k", "v")}


def for_steps(params: dict) -> dict:
    """Params as one-token steps on a CPU read them fastest; `hidden` and `logits` take them too.

    The layers become a tuple, since a scan copies each layer's slice of stacked weights at every
    step; kernels are transposed for `layers.matmul_few_rows`, to "kernel_t".
    """

    def transposed(tree):
        flat = traverse_util.flatten_dict(tree)
        for path in [path for path in flat if path[-1] == "kernel"]:
            flat[*path[:-1], "kernel_t"] = flat.pop(path).T
        return traverse_util.unflatten_dict(flat)

    num_layers = len(jax.tree.leaves(params["layers"])[0])
    layer = lambda i: jax.tree.map(lambda leaf: leaf[i], params["layers"])
    params = {**params, "layers": tuple(transposed(layer(i)) for i in range(num_layers))}
    if "head" in params:
        params["head"] = transposed(params["head"])
    return params


def sublayers(model: LLM, params: dict, start: int, stop: int) -> tuple[LLM, dict]:
    """Layers start … stop-1 as a model of their own, with embedding, norm and head kept."""
    local = model.config.local_layers
    config = dataclasses.replace(
        model.config,
        num_layers=stop - start,
        local_layers=None if local is None else local[start:stop],
    )
    stacked = jax.tree.map(lambda leaf: leaf[start:stop], params["layers"])
    return LLM(config, model.mesh), {**params, "layers": stacked}
