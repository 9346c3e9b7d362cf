"""Speech encoders of all kinds, by their configuration.

An encoder is a module of (frames [B, F, M], length [B]) to (features [B, S, E], length [B]): frames
as its `frontend` makes them, features in its `dtype`, zero in padding, which may hold anything. Its
configuration says what it reads (`frontend`), how wide its features are (`embed_dim`), how many
positions come of frames (`output_length`), and has the fields `dtype`, `remat`, `attention`,
`num_heads` and `mlp_dim`, as they are described in `speech_encoder`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from otreg_jax.data import features
from otreg_jax.models import conformer_encoder, speech_encoder, waveform_encoder
from otreg_jax.models.conformer_encoder import ConformerEncoder, ConformerEncoderConfig
from otreg_jax.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from otreg_jax.models.waveform_encoder import WaveformEncoder, WaveformEncoderConfig

EncoderConfig = SpeechEncoderConfig | WaveformEncoderConfig | ConformerEncoderConfig
_KINDS = {
    SpeechEncoderConfig: (SpeechEncoder, speech_encoder.output_length),
    WaveformEncoderConfig: (WaveformEncoder, waveform_encoder.output_length),
    ConformerEncoderConfig: (ConformerEncoder, conformer_encoder.output_length),
}


def make(config: EncoderConfig, mesh: Mesh | None = None) -> nn.Module:
    """The encoder of a configuration, computing on `mesh`."""
    return _KINDS[type(config)][0](config, mesh)


def output_length(config: EncoderConfig, frames):
    """Positions that `frames` frames become; an int or an array of them."""
    return _KINDS[type(config)][1](config, frames)


def packed_length(config: EncoderConfig) -> Callable | None:
    """A function of frames, an int or an array: the positions that they become in the layers of an
    encoder whose call takes "segments", see `packing`; None: this one does not."""
    if isinstance(config, SpeechEncoderConfig):
        return functools.partial(speech_encoder.inner_length, config)
    return None


def frontend(config: EncoderConfig) -> features.Frontend:
    """What the encoder reads."""
    if isinstance(config, SpeechEncoderConfig):
        return features.Frontend("log_mel", config.num_mels)
    return features.WAVEFORM


def example(config: EncoderConfig) -> tuple[jax.Array, jax.Array]:
    """Frames and their number, to make the parameters by."""
    return jnp.zeros((1, 16, frontend(config).width)), jnp.array([16])


def is_biased(config: EncoderConfig) -> bool:
    """Whether attention adds something to its scores, which not every kernel does."""
    if isinstance(config, WaveformEncoderConfig):
        return config.relative is not None
    return isinstance(config, ConformerEncoderConfig)
