"""Adapters: from the speech encoder's features to embeddings the LLM reads.

Every kind shortens by a factor known statically, masks padding exactly and ends in a projection to
the LLM's width.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from otreg_jax.models import layers

KINDS = ("mlp", "conv", "transformer", "conformer", "qformer", "linear", "voxtral", "ultravox")
HEADLESS = ("mlp", "conv", "linear", "voxtral", "ultravox")  # kinds without attention
NORMS = ("none", "table")
CONFORMER_WIDTH = 15  # positions of its convolution: 1.2 s where one is 80 ms, as in the paper


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is made of.

    kind:
      "mlp": `stack` neighbouring positions side by side, then an MLP (SLAM-ASR, 2402.08846);
      "conv": a convolution of width 2·stack - 1 and stride `stack`, then the MLP;
      "transformer": stacked positions, `num_layers` Transformer blocks, then a projection;
      "conformer": the same with Conformer blocks (2005.08100);
      "qformer": `num_queries` learned queries read each window of `stack` positions through
        `num_layers` blocks of cross-attention (window-level Q-Former, SALMONN, 2310.13289);
      "linear": stacked positions through one layer (Qwen2-Audio's, 2407.10759, at `stack` 1);
      "voxtral": stacked positions through two layers without bias (Voxtral, 2507.13264);
      "ultravox": stacked positions, RMSNorm, a SwiGLU of `hidden_dim` columns in, half as many out,
        RMSNorm, a projection, all without bias (Ultravox, https://github.com/fixie-ai/ultravox).
    in_dim, out_dim: widths of the encoder and of the LLM.
    dropout: of the last hidden layer, where `apply` is given a "dropout" rng (training).
    norm: "none", or "table": every output has the same norm, a learned scalar that starts at the
      median norm of the LLM's embedding table, so that the LLM meets speech as loud as text.
    late_norm: "ultravox": the second norm follows the projection, as up to version 0.4.1.
    """

    in_dim: int
    out_dim: int
    hidden_dim: int
    kind: str = "mlp"
    stack: int = 4
    num_layers: int = 2
    num_heads: int = 8
    num_queries: int = 1
    dropout: float = 0.0
    norm: str = "none"
    late_norm: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"adapter: unknown kind {self.kind!r}, choose from {', '.join(KINDS)}")
        if self.norm not in NORMS:
            raise ValueError(f"adapter: unknown norm {self.norm!r}, choose from {', '.join(NORMS)}")
        if self.kind == "ultravox" and self.hidden_dim % 2:
            raise ValueError(
                f"adapter: hidden_dim {self.hidden_dim} must be even: SwiGLU halves it"
            )
        if self.kind not in HEADLESS and self.hidden_dim % self.num_heads:
            raise ValueError(
                f"adapter: hidden_dim {self.hidden_dim} must be a multiple of num_heads "
                f"{self.num_heads}"
            )


def output_length(config: AdapterConfig, positions):
    """Speech embeddings that `positions` encoder positions become; an int or an array of them."""
    windows = -(-positions // config.stack)
    return windows * config.num_queries if config.kind == "qformer" else windows


def _windows(x_BSE: jax.Array, size: int) -> jax.Array:
    """Consecutive windows of `size` positions, zero-filled at the end: [B, W, size, E]."""
    B, S, E = x_BSE.shape
    x_BSE = jnp.pad(x_BSE, ((0, 0), (0, -S % size), (0, 0)))
    return x_BSE.reshape(B, -1, size, E)


class CrossBlock(nn.Module):
    """Pre-norm block: queries attend to a window, then an MLP."""

    num_heads: int
    mlp_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x_BQE: jax.Array, length_B: jax.Array, memory_BSE: jax.Array):
        norm = functools.partial(layers.layer_norm, dtype=self.dtype)
        attend = layers.EncoderAttention(self.num_heads, self.dtype, name="attn")
        mlp = layers.EncoderMLP(self.mlp_dim, dtype=self.dtype, name="mlp")
        x_BQE = x_BQE + attend(norm("attn_norm", x_BQE), length_B, memory_BSE)
        return x_BQE + mlp(norm("mlp_norm", x_BQE)), None


class ConformerBlock(nn.Module):
    """Half an MLP, self-attention, a convolution, half an MLP, norm (Conformer, 2005.08100).

    Two departures: LayerNorm stands for the convolution's BatchNorm, whose statistics padding and
    batch would change, and attention has no relative positions: the encoder's outputs know theirs.
    """

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x_BSE: jax.Array, length_B: jax.Array) -> tuple[jax.Array, None]:
        width = x_BSE.shape[-1]
        norm = functools.partial(layers.layer_norm, dtype=self.dtype)

        def mlp(name: str) -> layers.EncoderMLP:
            return layers.EncoderMLP(4 * width, "silu", self.dtype, name=name)

        def convolve(x_BSE):
            gated = layers.Dense(2 * width, True, dtype=self.dtype, name="pointwise_in")(x_BSE)
            x_BSE = layers.zero_padding(jax.nn.glu(gated), length_B)
            depthwise = nn.Conv(
                width,
                (CONFORMER_WIDTH,),
                feature_group_count=width,
                dtype=self.dtype,
                name="depthwise",
            )
            x_BSE = jax.nn.silu(norm("depthwise_norm", depthwise(x_BSE)))
            return layers.Dense(width, True, dtype=self.dtype, name="pointwise_out")(x_BSE)

        attend = layers.EncoderAttention(self.num_heads, self.dtype, name="attn")
        x_BSE += 0.5 * mlp("mlp1")(norm("mlp1_norm", x_BSE))
        x_BSE += attend(norm("attn_norm", x_BSE), length_B)
        x_BSE += convolve(norm("conv_norm", x_BSE))
        x_BSE += 0.5 * mlp("mlp2")(norm("mlp2_norm", x_BSE))
        return norm("norm", x_BSE), None


class Adapter(nn.Module):
    """Speech features [B, S, in_dim], int32 [B] to [B, output_length(S), out_dim], int32 [B].

    The output is zero in padding; whatever the padding of the input holds, it never matters.
    """

    config: AdapterConfig

    @nn.compact
    def __call__(self, x_BSE: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        x_BSE = layers.zero_padding(x_BSE, length_B).astype(c.dtype)
        body = {
            "mlp": self._stacked,
            "conv": self._convolved,
            "transformer": self._transformed,
            "conformer": self._transformed,
            "qformer": self._queried,
            "linear": self._stack,
            "voxtral": self._two_layers,
            "ultravox": self._gated,
        }[c.kind]
        y_BSH = body(x_BSE, length_B)
        y_BSH = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(y_BSH)
        has_bias = c.kind not in ("voxtral", "ultravox")
        speech_BSD = layers.Dense(c.out_dim, has_bias, dtype=c.dtype, name="out")(y_BSH)
        if c.late_norm:
            speech_BSD = layers.RMSNorm(1e-6, dtype=c.dtype, name="out_norm")(speech_BSD)
        if c.norm == "table":
            scale = self.param("scale", nn.initializers.ones, ())
            square_BS1 = jnp.sum(jnp.square(speech_BSD.astype(jnp.float32)), -1, keepdims=True)
            factor_BS1 = scale * jax.lax.rsqrt(jnp.maximum(square_BS1, 1e-12))
            speech_BSD = speech_BSD * factor_BS1.astype(speech_BSD.dtype)
        length_B = output_length(c, length_B)
        return layers.zero_padding(speech_BSD, length_B), length_B

    def _project(self, x: jax.Array, has_bias: bool = True) -> jax.Array:
        c = self.config
        return layers.Dense(c.hidden_dim, has_bias, dtype=c.dtype, name="in")(x)

    def _stack(self, x_BSE, length_B):
        windows = _windows(x_BSE, self.config.stack)
        return windows.reshape(*windows.shape[:2], -1)

    def _stacked(self, x_BSE, length_B):
        return jax.nn.gelu(self._project(self._stack(x_BSE, length_B)))

    def _two_layers(self, x_BSE, length_B):
        hidden_BSH = self._project(self._stack(x_BSE, length_B), has_bias=False)
        return jax.nn.gelu(hidden_BSH, approximate=False)

    def _gated(self, x_BSE, length_B):
        norm = functools.partial(layers.RMSNorm, 1e-6, dtype=self.config.dtype)
        normed = norm(name="in_norm")(self._stack(x_BSE, length_B))
        value, gate = jnp.split(self._project(normed, has_bias=False), 2, axis=-1)
        gated = value * jax.nn.silu(gate)
        return gated if self.config.late_norm else norm(name="mid_norm")(gated)

    def _convolved(self, x_BSE, length_B):
        c = self.config
        pad = (c.stack - 1, -x_BSE.shape[1] % c.stack)
        width = (2 * c.stack - 1,)
        conv = nn.Conv(c.hidden_dim, width, c.stack, padding=[pad], dtype=c.dtype, name="conv")
        return jax.nn.gelu(self._project(jax.nn.gelu(conv(x_BSE))))

    def _transformed(self, x_BSE, length_B):
        c = self.config
        x_BSH = self._project(self._stack(x_BSE, length_B))
        if c.kind == "conformer":
            block, shape = ConformerBlock, ()
        else:
            block, shape = layers.EncoderBlock, (4 * c.hidden_dim,)
        blocks = layers.scanned(block, c.num_layers, (nn.broadcast,), remat="none")
        block = blocks(c.num_heads, *shape, dtype=c.dtype, name="layers")
        x_BSH, _ = block(x_BSH, output_length(c, length_B))
        return layers.layer_norm("norm", x_BSH, c.dtype)

    def _queried(self, x_BSE, length_B):
        c = self.config
        windows = _windows(x_BSE, c.stack)
        B, W = windows.shape[:2]
        memory = self._project(windows).reshape(B * W, c.stack, c.hidden_dim)
        valid_BW = jnp.clip(length_B[:, None] - c.stack * jnp.arange(W)[None], 0, c.stack)
        queries = self.param(
            "queries", nn.initializers.normal(1.0), (c.num_queries, c.hidden_dim)
        ).astype(c.dtype)
        x = jnp.broadcast_to(queries, (B * W, *queries.shape))
        axes = (nn.broadcast, nn.broadcast)
        blocks = layers.scanned(CrossBlock, c.num_layers, axes, remat="none")
        x, _ = blocks(c.num_heads, 4 * c.hidden_dim, c.dtype, name="layers")(
            x, valid_BW.reshape(-1), memory
        )
        x = layers.layer_norm("norm", x, c.dtype)
        return x.reshape(B, W * c.num_queries, c.hidden_dim)
