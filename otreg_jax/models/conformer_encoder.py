"""Conformer speech encoders (arXiv 2005.08100) that make filter banks of the waveform: w2v-BERT 2.0
(2312.05187) and Parakeet's FastConformer (2305.05084), which differ in settings.

Padding is masked in the statistics of the filter banks, in every convolution and in attention: an
utterance gives the same output alone or in any batch.
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
from otreg_jax.data import filterbanks
from otreg_jax.data.features import HOP, WINDOW
from otreg_jax.models import layers
from otreg_jax.models.attention import attention, length_mask

_LOST = -(-(WINDOW - HOP) // HOP)  # frames at the end, whose windows are not whole (Kaldi)


@dataclasses.dataclass(frozen=True)
class ConformerEncoderConfig:
    """The shape of such an encoder.

    family: "wav2vec2-bert" or "parakeet_encoder". It names the tensors in files, and the filter
      bank, Kaldi's or NeMo's.
    num_mels: filters of that bank.
    stack: so many frames side by side become one position; 0: strided convolutions make it.
    subsampling: (number, channels) of these convolutions; each halves the frames.
    conv_kernel: width of the blocks' convolutions, which see what comes before only in w2v-BERT.
    conv_bias, dense_bias: whether the blocks' convolutions, and their other layers, have biases.
    distances: (before, after), the farthest that have an embedding of their own in attention; None:
      relative positions as in Transformer-XL (1901.02860), at any distance.
    scale_input: what enters the blocks is multiplied by the root of its width.
    dtype, remat, attention: as in `SpeechEncoderConfig`.
    """

    family: str
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_mels: int = 80
    stack: int = 0
    subsampling: tuple[int, int] = (3, 256)
    conv_kernel: int = 9
    conv_bias: bool = True
    dense_bias: bool = True
    distances: tuple[int, int] | None = None
    scale_input: bool = True
    activation: str = "silu"
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"


def output_length(config: ConformerEncoderConfig, frames):
    """Positions that `frames` frames of 10 ms become; an int or an array of them. Audio too short
    for one position is read as if silence filled it up."""
    if config.stack:
        missing = config.stack + _LOST - frames
        return (frames + (missing > 0) * missing - _LOST) // config.stack
    for _ in range(config.subsampling[0]):
        frames = -(-frames // 2)
    return frames


class ConformerEncoder(nn.Module):
    """Samples to speech features.

    Params: projection_norm/… or conv1/…, depthwise2/…, pointwise2/… and so on, projection/…,
    layers/… stacked over the layers. `mesh`: what its activations are spread over.
    """

    config: ConformerEncoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, frames_BFM: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float [B, F, 160], samples at 16 kHz, and int32 [B], frames, to features [B, S, E] and
        int32 [B]; features in `config.dtype`, zero in padding."""
        c = self.config
        spread = functools.partial(sharding.over_batch, mesh=self.mesh)
        x, length_B = self._stacked(*self._audio(frames_BFM, length_B))
        x_BSE = layers.Dense(c.embed_dim, True, dtype=c.dtype, name="projection")(x)
        if c.scale_input:
            x_BSE *= math.sqrt(c.embed_dim)
        x_BSE = spread(layers.zero_padding(x_BSE, length_B))
        blocks = layers.scanned(Block, c.num_layers, (nn.broadcast,), c.remat)
        x_BSE, _ = blocks(c, self.mesh, name="layers")(x_BSE, length_B)
        return layers.zero_padding(x_BSE, length_B), length_B

    def _audio(self, frames_BFM: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 samples [B, N], zero from their number [B] on; silence makes them enough for one
        position."""
        c = self.config
        shortest = HOP * (c.stack + _LOST if c.stack else 1)
        frames_BFM = layers.zero_padding(frames_BFM.astype(jnp.float32), length_B)
        audio_BN = frames_BFM.reshape(len(frames_BFM), -1)
        audio_BN = jnp.pad(audio_BN, ((0, 0), (0, max(shortest - audio_BN.shape[1], 0))))
        return audio_BN, jnp.maximum(length_B * HOP, shortest)

    def _stacked(self, audio_BN: jax.Array, samples_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What of the filter bank becomes a position, [B, S, …], and their number."""
        c = self.config
        if c.stack:
            x_BFM, length_B = filterbanks.kaldi(audio_BN, samples_B, c.num_mels)
            length_B = length_B // c.stack
            size = x_BFM.shape[1] // c.stack
            x_BSX = x_BFM[:, : size * c.stack].reshape(len(x_BFM), size, c.stack * c.num_mels)
            return layers.layer_norm("projection_norm", x_BSX.astype(c.dtype), c.dtype), length_B
        x_BFM, length_B = filterbanks.nemo(audio_BN, samples_B, c.num_mels)
        number, width = c.subsampling
        x_BMSC = x_BFM.swapaxes(1, 2)[..., None].astype(c.dtype)
        conv = functools.partial(nn.Conv, width, dtype=c.dtype)
        for i in range(1, number + 1):
            name, groups = (f"depthwise{i}", width) if i > 1 else ("conv1", 1)
            halve = conv((3, 3), 2, padding=1, feature_group_count=groups, name=name)
            x_BMSC, length_B = halve(x_BMSC), (length_B + 1) // 2
            if i > 1:
                x_BMSC = conv((1, 1), name=f"pointwise{i}")(x_BMSC)
            valid_BS = length_mask(length_B, x_BMSC.shape[2])
            x_BMSC = jax.nn.relu(jnp.where(valid_BS[:, None, :, None], x_BMSC, 0))
        x_BSCM = x_BMSC.transpose(0, 2, 3, 1)
        return x_BSCM.reshape(*x_BSCM.shape[:2], -1), length_B


class Block(nn.Module):
    """Half an MLP, self-attention, a convolution, half an MLP, norm."""

    config: ConformerEncoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x_BSE: jax.Array, length_B: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        norm = functools.partial(layers.layer_norm, dtype=c.dtype)
        spread = functools.partial(sharding.over_batch, mesh=self.mesh)
        mlp = functools.partial(
            layers.EncoderMLP, c.mlp_dim, c.activation, c.dtype, use_bias=c.dense_bias
        )
        attend = RelativeAttention(c, self.mesh, name="attn")
        x_BSE = spread(x_BSE + 0.5 * mlp(name="mlp1")(norm("mlp1_norm", x_BSE)))
        x_BSE = spread(x_BSE + attend(norm("attn_norm", x_BSE), length_B))
        x_BSE = spread(x_BSE + self._convolve(norm("conv_norm", x_BSE), length_B))
        x_BSE = spread(x_BSE + 0.5 * mlp(name="mlp2")(norm("mlp2_norm", x_BSE)))
        return norm("norm", x_BSE), None

    def _convolve(self, x_BSE: jax.Array, length_B: jax.Array) -> jax.Array:
        c, is_causal = self.config, self.config.family == "wav2vec2-bert"
        conv = functools.partial(nn.Conv, use_bias=c.conv_bias, dtype=c.dtype)
        gated = jax.nn.glu(conv(2 * c.embed_dim, (1,), name="conv_in")(x_BSE))
        before = c.conv_kernel - 1 if is_causal else c.conv_kernel // 2
        x_BSE = conv(
            c.embed_dim,
            (c.conv_kernel,),
            padding=[(before, c.conv_kernel - 1 - before)],
            feature_group_count=c.embed_dim,
            name="depthwise",
        )(layers.zero_padding(gated, length_B))
        if is_causal:
            x_BSE = layers.layer_norm("depthwise_norm", x_BSE, c.dtype)
        else:
            x_BSE = KeptNorm(c.dtype, name="depthwise_norm")(x_BSE)
        x_BSE = layers.ACTIVATIONS[c.activation](x_BSE)
        return conv(c.embed_dim, (1,), name="conv_out")(x_BSE)


class KeptNorm(nn.Module):
    """A batch norm by the statistics that it was trained to; they stay what they are."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BSE: jax.Array) -> jax.Array:
        width, ones, zeros = x_BSE.shape[-1], nn.initializers.ones, nn.initializers.zeros
        read = lambda name, init: self.param(name, init, (width,)).astype(jnp.float32)[None, None]
        mean, variance = jax.lax.stop_gradient((read("mean", zeros), read("variance", ones)))
        x_BSE = (x_BSE.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + 1e-5)
        return (x_BSE * read("scale", ones) + read("bias", zeros)).astype(self.dtype)


class RelativeAttention(nn.Module):
    """Multi-head self-attention whose scores know how far apart two positions are."""

    config: ConformerEncoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x_BSE: jax.Array, length_B: jax.Array) -> jax.Array:
        c, (B, S, E) = self.config, x_BSE.shape
        dense = functools.partial(layers.Dense, E, dtype=c.dtype)
        heads = lambda name: dense(c.dense_bias, name=name)(x_BSE).reshape(B, S, c.num_heads, -1)
        q, k, v = (heads(name) for name in "qkv")
        scale = q.shape[-1] ** -0.5
        if c.distances:
            before, after = c.distances
            table = nn.Embed(before + after + 1, q.shape[-1], dtype=c.dtype, name="distance")
            scores = jnp.einsum("BSHd,Rd->BHSR", q, table.embedding.astype(c.dtype))
            away_SS = np.clip(np.arange(S)[None] - np.arange(S)[:, None], -before, after) + before
            bias_BHSS = jnp.take_along_axis(scores, away_SS[None, None], axis=3)
        else:
            added = nn.initializers.normal(0.02), (c.num_heads, q.shape[-1])
            read = lambda name: self.param(name, *added).astype(c.dtype)[None, None]
            by_content, by_position = read("content_bias"), read("position_bias")
            waves_RE = jnp.asarray(relative_waves(S, E), c.dtype)
            relative = dense(False, name="relative")(waves_RE).reshape(-1, *q.shape[2:])
            scores = jnp.einsum("BSHd,RHd->BHSR", q + by_position, relative)
            bias_BHSS, q = shifted(scores), q + by_content
        y = attention(
            q, k, v, scale=scale, length_B=length_B, bias_BHLS=bias_BHSS * scale, mesh=self.mesh
        )
        return dense(c.dense_bias, name="o")(y.reshape(B, S, E))


def relative_waves(length: int, width: int) -> np.ndarray:
    """float32 [2 length - 1, width]: sines and cosines, in turn, of the distances length - 1 down
    to 1 - length (Transformer-XL, 1901.02860, section 3.3)."""
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length - 1, -length, -1)[:, None] * rates
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(-1, width).astype(np.float32)


def shifted(scores_BHSR: jax.Array) -> jax.Array:
    """Scores by distance, length - 1 down to 1 - length, to scores by position [B, H, S, S]: every
    row of them begins one place further left than the row below it (1901.02860, appendix B)."""
    B, H, S, R = scores_BHSR.shape
    padded = jnp.pad(scores_BHSR, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return padded.reshape(B, H, R + 1, S)[:, :, 1:].reshape(B, H, S, R)[..., :S]
