"""Speech encoders that read the waveform: wav2vec 2.0 (arXiv 2006.11477), HuBERT (2106.07447) and
WavLM (2110.13900), which differ in settings.

Strided convolutions turn 16 kHz into 50 positions a second, a wide grouped convolution tells
positions apart, Transformer blocks follow. Padding is masked wherever it could be seen. Also in the
norm over time of the first convolution (`conv_norm="group"`): there the published models see it, so
that what they say of an utterance depends on what it is padded to. Here it is what they say of the
utterance alone.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from otreg_jax import sharding
from otreg_jax.data.features import HOP
from otreg_jax.models import layers


@dataclasses.dataclass(frozen=True)
class WaveformEncoderConfig:
    """The shape of such an encoder.

    family: "wav2vec2", "hubert" or "wavlm"; the names in files, nothing is computed from it.
    conv_widths, conv_kernels, conv_strides: channels, width and stride of each convolution.
    conv_norm: "group": the first one's outputs are normed over time, channel by channel; "layer":
      all outputs over the channels.
    projection_norm: a LayerNorm stands before the projection to `embed_dim`.
    position_kernel, position_groups: of the convolution that tells positions apart.
    pre_norm: norms before the sublayers ("stable layer norm"), else after them.
    relative: (buckets, largest distance) of WavLM's gated bias by relative position, or None.
    normalize: the audio of each utterance is brought to zero mean and unit variance first.
    dtype, remat, attention: as in `SpeechEncoderConfig`.
    """

    family: str
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    conv_widths: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_norm: str = "group"
    conv_activation: str = "gelu"
    projection_norm: bool = True
    position_kernel: int = 128
    position_groups: int = 16
    pre_norm: bool = False
    relative: tuple[int, int] | None = None
    normalize: bool = True
    activation: str = "gelu"
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"


def output_length(config: WaveformEncoderConfig, frames):
    """Positions that `frames` frames of 10 ms become; an int or an array of them. Audio too short
    for one position is read as if silence filled it up."""
    samples = frames * HOP
    shortest = _receptive_field(config)
    samples = samples + (samples < shortest) * (shortest - samples)
    return _convolved(config, samples)[-1]


def _receptive_field(config: WaveformEncoderConfig) -> int:
    """The samples that one position is computed from."""
    samples = 1
    for kernel, stride in zip(config.conv_kernels[::-1], config.conv_strides[::-1], strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def _convolved(config: WaveformEncoderConfig, samples) -> list:
    """Positions after each of the convolutions."""
    lengths = []
    for kernel, stride in zip(config.conv_kernels, config.conv_strides, strict=True):
        samples = (samples - kernel) // stride + 1
        lengths.append(samples)
    return lengths


class WaveformEncoder(nn.Module):
    """Samples to speech features.

    Params: conv1/…, conv1_norm/… (and so on), projection_norm/…, projection/…, positions/…,
    relative/embedding, layers/… stacked over the layers, norm/…. `mesh`: what its activations are
    spread over.
    """

    config: WaveformEncoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, frames_BFM: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float [B, F, 160], samples at 16 kHz, and int32 [B], frames, to features [B, S, E] and
        int32 [B]; features in `config.dtype`, zero in padding."""
        c = self.config
        norm = functools.partial(layers.layer_norm, dtype=c.dtype)
        spread = functools.partial(sharding.over_batch, mesh=self.mesh)
        audio_BN1, samples_B = self._audio(frames_BFM, length_B)
        x, shapes = audio_BN1, zip(c.conv_widths, c.conv_kernels, c.conv_strides, strict=True)
        length_of = _convolved(c, samples_B)
        for i, (width, kernel, stride) in enumerate(shapes, start=1):
            conv = nn.Conv(
                width,
                (kernel,),
                stride,
                padding="VALID",
                use_bias=c.conv_bias,
                dtype=c.dtype,
                name=f"conv{i}",
            )
            x = conv(x)
            if c.conv_norm == "layer":
                x = norm(f"conv{i}_norm", x)
            elif i == 1:
                x = NormOverTime(c.dtype, name="conv1_norm")(x, length_of[0])
            x = spread(layers.ACTIVATIONS[c.conv_activation](x))
        length_B = length_of[-1]
        if c.projection_norm:
            x = norm("projection_norm", x)
        x_BSE = layers.Dense(c.embed_dim, True, dtype=c.dtype, name="projection")(x)
        x_BSE = layers.zero_padding(x_BSE, length_B)
        positions = PositionConv(c.position_kernel, c.position_groups, c.dtype, name="positions")
        x_BSE = spread(x_BSE + layers.ACTIVATIONS[c.conv_activation](positions(x_BSE)))
        bias_HSS = None
        if c.relative:
            table = nn.Embed(c.relative[0], c.num_heads, dtype="float32", name="relative")
            bias_HSS = jnp.moveaxis(table(relative_buckets(x_BSE.shape[1], *c.relative)), -1, 0)
        if not c.pre_norm:
            x_BSE = norm("norm", x_BSE)
        blocks = layers.scanned(Block, c.num_layers, (nn.broadcast, nn.broadcast), c.remat)
        x_BSE, _ = blocks(c, self.mesh, name="layers")(x_BSE, length_B, bias_HSS)
        if c.pre_norm:
            x_BSE = norm("norm", x_BSE)
        return layers.zero_padding(x_BSE, length_B), length_B

    def _audio(self, frames_BFM: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Samples [B, N, 1], zero from their number [B] on."""
        c, shortest = self.config, _receptive_field(self.config)
        audio_BN1 = frames_BFM.reshape(len(frames_BFM), -1, 1).astype(jnp.float32)
        samples_B = length_B * HOP
        audio_BN1 = layers.zero_padding(audio_BN1, samples_B)
        if c.normalize:
            count_B11 = jnp.maximum(samples_B, 1)[:, None, None].astype(jnp.float32)
            mean_B11 = audio_BN1.sum(axis=1, keepdims=True) / count_B11
            audio_BN1 = layers.zero_padding(audio_BN1 - mean_B11, samples_B)
            power_B11 = jnp.square(audio_BN1).sum(axis=1, keepdims=True) / count_B11
            audio_BN1 *= jax.lax.rsqrt(power_B11 + 1e-7)
        missing = max(shortest - audio_BN1.shape[1], 0)
        audio_BN1 = jnp.pad(audio_BN1, ((0, 0), (0, missing), (0, 0)))
        return audio_BN1.astype(c.dtype), jnp.maximum(samples_B, shortest)


class NormOverTime(nn.Module):
    """Each channel normed over the valid positions of its utterance, times scale, plus bias: a
    group norm of as many groups as channels."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BSE: jax.Array, length_B: jax.Array) -> jax.Array:
        width = x_BSE.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,)).astype(jnp.float32)
        count_B11 = length_B[:, None, None].astype(jnp.float32)
        x_BSE = layers.zero_padding(x_BSE.astype(jnp.float32), length_B)
        mean_B1E = x_BSE.sum(axis=1, keepdims=True) / count_B11
        x_BSE = layers.zero_padding(x_BSE - mean_B1E, length_B)
        variance_B1E = jnp.square(x_BSE).sum(axis=1, keepdims=True) / count_B11
        x_BSE = x_BSE * jax.lax.rsqrt(variance_B1E + 1e-5)
        return (x_BSE * scale[None, None] + bias[None, None]).astype(self.dtype)


class PositionConv(nn.Module):
    """A grouped convolution over time, of as many positions out as in, with normed weights: the
    kernel is weight_v / |weight_v| · weight_g, a norm for each of its places (arXiv 1602.07868)."""

    kernel: int
    groups: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        width = x_BSE.shape[-1]
        init = nn.initializers.normal(math.sqrt(4 / (self.kernel * width)))
        weight_v = self.param("weight_v", init, (self.kernel, width // self.groups, width))
        weight_g = self.param("weight_g", nn.initializers.ones, (self.kernel, 1, 1))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        weight_v = weight_v.astype(jnp.float32)
        norm = jnp.sqrt(jnp.square(weight_v).sum(axis=(1, 2), keepdims=True))
        weight = weight_v * (weight_g.astype(jnp.float32) / norm)
        y_BSE = jax.lax.conv_general_dilated(
            x_BSE.astype(self.dtype),
            weight.astype(self.dtype),
            window_strides=(1,),
            padding=[(self.kernel // 2, (self.kernel - 1) // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return y_BSE + bias.astype(self.dtype)[None, None]


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """int32 [length, length]: the bucket of position s as seen from position l, l - s.

    Half of the buckets are for what comes before, half for what comes after. The nearer half of
    each are single distances, the others grow with the distance's logarithm up to `max_distance`
    (T5, arXiv 1910.10683).
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    side = num_buckets // 2
    exact = side // 2
    far = np.maximum(np.abs(distance), 1).astype(np.float32)  # torch computes this in float32
    far = np.log(far / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (far * np.float32(side - exact)).astype(np.int32), side - 1)
    near = np.abs(distance) < exact
    return ((distance > 0) * side + np.where(near, np.abs(distance), far)).astype(np.int32)


class Block(nn.Module):
    """Transformer encoder block, norms before or after the sublayers, with or without WavLM's gate
    on the bias by relative position."""

    config: WaveformEncoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x_BSE: jax.Array, length_B: jax.Array, bias_HSS: jax.Array | None
    ) -> tuple[jax.Array, None]:
        c = self.config
        norm = functools.partial(layers.layer_norm, dtype=c.dtype)
        spread = functools.partial(sharding.over_batch, mesh=self.mesh)
        attn = layers.EncoderAttention(
            c.num_heads, c.dtype, c.attention, self.mesh, key_bias=True, name="attn"
        )
        mlp = layers.EncoderMLP(c.mlp_dim, c.activation, c.dtype, name="mlp")

        def attend(x_BSE):
            bias_BHSS = None
            if bias_HSS is not None:
                gate = RelativeGate(c.num_heads, c.dtype, name="relative_gate")
                bias_BHSS = gate(x_BSE)[..., None] * bias_HSS[None]
            return attn(x_BSE, length_B, bias_BHLS=bias_BHSS)

        if c.pre_norm:
            x_BSE = spread(x_BSE + attend(norm("attn_norm", x_BSE)))
            return spread(x_BSE + mlp(norm("mlp_norm", x_BSE))), None
        x_BSE = spread(norm("attn_norm", x_BSE + attend(x_BSE)))
        return spread(norm("mlp_norm", x_BSE + mlp(x_BSE))), None


class RelativeGate(nn.Module):
    """WavLM's factor of the bias by relative position, float32 [B, H, S], from what each position's
    part of each head holds (arXiv 2110.13900, equation 6)."""

    num_heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        const = self.param("const", nn.initializers.ones, (1, self.num_heads, 1, 1))
        heads_BSHd = x_BSE.reshape(*x_BSE.shape[:2], self.num_heads, -1)
        y = layers.Dense(8, True, dtype=self.dtype, name="linear")(heads_BSHd)
        y = y.astype(jnp.float32).reshape(*y.shape[:3], 2, 4).sum(axis=-1)
        renew_BHS, reset_BHS = jnp.moveaxis(
            jax.nn.sigmoid(y), (3, 2), (0, 2)
        )  # 1 - g_update, g_reset
        return renew_BHS * (reset_BHS * const.astype(jnp.float32)[..., 0] - 1) + 2
