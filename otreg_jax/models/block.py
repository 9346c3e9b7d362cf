"""The block that LLMs are made of, attention and MLP, and the configuration that tells families
apart.

Where layers differ in no shape (local and global attention, two RoPE bases) the block picks its
mask and its rotation by a per-layer index; where they do, each shape has a configuration of its own
(`shapes`).
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from otreg_jax import packing, sharding
from otreg_jax.models import layers
from otreg_jax.models.attention import attention
from otreg_jax.models.delta import DeltaHeads, DeltaNet
from otreg_jax.models.rope import RopeScaling, rope_frequencies, rotate

Cache = dict[str, jax.Array]  # {"k", "v"}: [num_layers, B, slots, K, head_dim]


@dataclasses.dataclass(frozen=True)
class WideHeads:
    """Heads of the global layers; value_is_key as in LLMConfig."""

    head_dim: int
    num_kv_heads: int
    value_is_key: bool = False


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
    local_layers: for each layer whether it is local, or linear where there is `delta`; None: all of
      them when there is a window.
    local_rope_theta: RoPE base of the local layers, unscaled; None: as the global ones; inf: they
      are not rotated, and without a window nothing else sets them apart (SmolLM3).
    gated: attention's output is multiplied by the sigmoid of a gate that lies beside each query.
    delta: heads of the linear layers, which are gated DeltaNets (Qwen3.5).
    wide: heads of the global layers where they are not those of the local ones (Gemma 4).
    value_is_key: values are the keys before their norm and rotation.
    value_norm: norm values, each head alone, without a scale.
    layer_scalar: each layer's output is multiplied by a number, which is not trained.
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
    gated: bool = False
    delta: DeltaHeads | None = None
    wide: WideHeads | None = None
    value_is_key: bool = False
    value_norm: bool = False
    layer_scalar: bool = False
    max_positions: int = 2048
    family: str = "llama"
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"


def layer_kinds(config: LLMConfig) -> np.ndarray:
    """int32 [num_layers]: 0 for a global layer, 1 for a local one."""
    local = config.local_layers
    if local is None:
        local = (config.sliding_window is not None,) * config.num_layers
    if len(local) != config.num_layers:
        raise ValueError(f"local_layers has {len(local)} entries for {config.num_layers} layers")
    return np.asarray(local, np.int32)


def shape_names(config: LLMConfig) -> tuple[str, ...]:
    """The shape of each layer, "full", "sliding" or "linear"; () where all layers have one."""
    if config.wide is None and config.delta is None:
        return ()
    names = "full", "linear" if config.delta else "sliding"
    return tuple(names[kind] for kind in layer_kinds(config))


def shape_config(config: LLMConfig, shape: str) -> LLMConfig:
    """The configuration of the layers of one shape, as if all were of it."""
    alike = dataclasses.replace(config, wide=None, local_layers=None)
    if shape != "full":
        return alike
    heads = dataclasses.asdict(config.wide) if config.wide else {}
    alone = dict(delta=None, sliding_window=None, local_rope_theta=None)
    return dataclasses.replace(alike, **heads, **alone)


def rope_tables(config: LLMConfig, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
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


def masks(config: LLMConfig, query_BL: jax.Array, slots: int) -> jax.Array:
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
    present = set(layer_kinds(config).tolist())
    return kinds[present.pop()](*qkv) if len(present) == 1 else jax.lax.switch(kind, kinds, *qkv)


class Attention(nn.Module):
    config: LLMConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x_BLD, cache, layer, kind, tables, positions_BL, packed):
        c = self.config
        cos_BLp, sin_BLp, mask_BLS = jax.tree.map(lambda table: table[kind], tables)
        is_step = mask_BLS is not None  # of one token
        place = lambda x, axis: sharding.to_weights(x, self.mesh, axis) if is_step else x
        x_BLD = place(x_BLD, "fsdp")

        def normed(name: str, x: jax.Array) -> jax.Array:
            return layers.RMSNorm(c.norm_eps, c.norm_offset, c.dtype, name=f"{name}_norm")(x)

        def project(name: str, heads: int, parts: int = 1) -> jax.Array:
            width = parts * c.head_dim
            y = layers.Dense(heads * width, c.qkv_bias, dtype=c.dtype, name=name)(x_BLD)
            y = place(normed(name, y) if c.qk_norm_whole and name != "v" else y, "tensor")
            return y.reshape(*y.shape[:2], heads, width)

        q, k = project("q", c.num_heads, 2 if c.gated else 1), project("k", c.num_kv_heads)
        if c.gated:
            q, gate = jnp.split(q, 2, axis=-1)
        v = k if c.value_is_key else project("v", c.num_kv_heads)
        if c.value_norm:
            v = layers.rms(v, c.norm_eps).astype(c.dtype)
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
            causal = functools.partial(
                attend,
                is_causal=True,
                length_B=None if packed is None else packing.lengths(packed),
                kernel=c.attention,
                mesh=self.mesh,
            )
            y = packing.apart(functools.partial(_by_kind, c, causal, kind), packed)(q, k, v)
        else:
            k, v = cache["k"][layer], cache["v"][layer]
            y = attend(q, k.astype(q.dtype), v.astype(q.dtype), mask_BLS)
        if c.gated:
            y = y * jax.nn.sigmoid(gate)
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
    """One layer. tables: (cos, sin, mask), as `rope_tables` and `masks` make them, the mask None
    but for one-token steps; of a DeltaNet (which positions hold something, None, as before).
    packed: how x and positions are packed, None: they are not.
    """

    config: LLMConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, carry, layer, kind, is_tap, tables, positions_BL, packed):
        c = self.config
        x_BLD, tapped, cache = carry

        def norm(name: str) -> layers.RMSNorm:
            return layers.RMSNorm(c.norm_eps, c.norm_offset, c.dtype, name=name)

        mlp = MLP(c, name="mlp")
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

        normed = before("attn_norm", x_BLD)
        if c.delta:
            delta = DeltaNet(c.delta, c.norm_eps, c.dtype, _residual_init(c), name="delta")
            if packed is None:
                y, cache = delta(normed, tables[0], cache, layer)
            else:
                y = packing.apart(lambda x_BLD: delta(x_BLD, None, None, layer)[0], packed)(normed)
        else:
            attend = Attention(c, self.mesh, name="attn")
            y, cache = attend(normed, cache, layer, kind, tables, positions_BL, packed)
        x_BLD = add(x_BLD, "attn_post_norm", y)
        x_BLD = add(x_BLD, "mlp_post_norm", mlp(before("mlp_norm", x_BLD)))
        if c.layer_scalar:
            scalar_1 = self.param("scalar", nn.initializers.ones, (1,)).astype(x_BLD.dtype)
            x_BLD = x_BLD * jax.lax.stop_gradient(scalar_1)[None, None]
        tapped = tuple(jnp.where(is_tap[i], x_BLD, kept) for i, kept in enumerate(tapped))
        return (x_BLD, tapped, cache), None
