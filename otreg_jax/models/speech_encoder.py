"""Whisper's speech encoder (arXiv 2212.04356), for inputs of any length up to its positions.

Whisper pads every input to 30 s. Here inputs keep their length: padding is masked in the
convolutions and in attention, so an utterance gives the same output alone or in any batch.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from otreg_jax import packing, sharding
from otreg_jax.models import layers


@dataclasses.dataclass(frozen=True)
class SpeechEncoderConfig:
    """The shape of a speech encoder; the defaults are Whisper's where it has one value.

    strides: one convolution of width 3 each; (1, 2) turns 100 frames a second into 50 positions.
    max_positions: rows of the position table, counted after the strides.
    pool: so many neighbouring positions are averaged before the last norm, and what fills no such
      group is left out (Qwen2-Audio, arXiv 2407.10759, has 2).
    reads_padding: the convolutions see what stands beyond an input's length, silence say; attention
      does not (Qwen2-Audio, whose inputs are always 30 s).
    dtype: what the layers compute in; the weights keep their own.
    attention: what computes it, see `attention.choose_kernel`.
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_mels: int = 80
    max_positions: int = 1500
    strides: tuple[int, ...] = (1, 2)
    pool: int = 1
    reads_padding: bool = False
    activation: str = "gelu"
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"


def output_length(config: SpeechEncoderConfig, frames):
    """Positions that `frames` mel frames become; an int or an array of them."""
    return inner_length(config, frames) // config.pool


def inner_length(config: SpeechEncoderConfig, frames):
    """Likewise the positions that the layers see."""
    for stride in config.strides:
        frames = -(-frames // stride)
    return frames


def sinusoids(length: int, width: int) -> np.ndarray:
    """Whisper's position table, float32 [length, width]: sines, then cosines, of width/2 rates."""
    rates = np.exp(-np.log(10_000.0) * np.arange(width // 2) / (width // 2 - 1))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class SpeechEncoder(nn.Module):
    """Log-mel spectrogram to speech features.

    Params: conv1/…, conv2/… (one for each stride), positions/embedding (sinusoids at first; Whisper
    never trains them), layers/… stacked over the layers, norm/…. `mesh`: what its activations
    are spread over.
    """

    config: SpeechEncoderConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        mel_BFM: jax.Array,
        mel_length_B: jax.Array,
        segments_RW: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """float [B, F, M] and int32 [B] to features [B, S, E] and int32 [B].

        The features come in `config.dtype`, zero in padding. With `segments_RW`, see `packing`, the
        layers run on packed rows. Raises ValueError when F frames exceed the position table.
        """
        c = self.config
        size = inner_length(c, mel_BFM.shape[1])
        if size > c.max_positions:
            raise ValueError(
                f"speech encoder: {mel_BFM.shape[1]} mel frames give {size} positions, the model "
                f"has {c.max_positions}: shorten the audio (max_duration) or raise max_positions"
            )
        hide = (lambda x, length_B: x) if c.reads_padding else layers.zero_padding
        x, length_B = hide(mel_BFM, mel_length_B).astype(c.dtype), mel_length_B
        for i, stride in enumerate(c.strides, start=1):
            conv = nn.Conv(c.embed_dim, (3,), stride, padding=1, dtype=c.dtype, name=f"conv{i}")
            x, length_B = layers.ACTIVATIONS[c.activation](conv(x)), -(-length_B // stride)
            x = sharding.over_batch(hide(x, length_B), self.mesh)
        positions = nn.Embed(
            c.max_positions,
            c.embed_dim,
            dtype=c.dtype,
            embedding_init=lambda _, shape, dtype: jnp.asarray(sinusoids(*shape), dtype),
            name="positions",
        )
        x_BSE = x + positions(jnp.arange(size)[None])
        packed = None
        if segments_RW is not None:
            packed = packing.packed(segments_RW, *x_BSE.shape[:2])
        axes = (nn.broadcast, nn.broadcast)
        blocks = layers.scanned(layers.EncoderBlock, c.num_layers, axes, c.remat)
        block = blocks(
            c.num_heads, c.mlp_dim, c.activation, c.dtype, c.attention, self.mesh, name="layers"
        )
        x_RWE, _ = block(packing.pack_rows(x_BSE, packed), length_B, packed)
        x_BSE = packing.unpack_rows(x_RWE, packed)
        if c.pool > 1:
            x_BSE = nn.avg_pool(x_BSE, (c.pool,), (c.pool,))
            length_B = length_B // c.pool
        x_BSE = layers.layer_norm("norm", x_BSE, c.dtype)
        return layers.zero_padding(x_BSE, length_B), length_B
