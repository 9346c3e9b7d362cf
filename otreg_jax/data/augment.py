"""Random changes of the training audio (on the host) and of its features (inside the step).

Every function draws from the generator or key it is given and from nothing else. The pipeline seeds
them by (seed, step, row of the global batch), before hosts take their rows.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.signal
import soxr

from otreg_jax.data.audio import SAMPLE_RATE, load_audio
from otreg_jax.data.utterances import Utterance


def change_speed(audio_N: np.ndarray, factor: float) -> np.ndarray:
    """Plays the audio `factor` times as fast, pitch included: float32 [ceil(N / factor)].

    Reference: Ko et al. 2015, "Audio augmentation for speech recognition".
    """
    if factor == 1:
        return audio_N
    changed = soxr.resample(audio_N, SAMPLE_RATE * factor, SAMPLE_RATE)
    length = math.ceil(len(audio_N) / factor)
    return np.pad(changed, (0, max(0, length - len(changed))))[:length]


def add_noise(audio_N: np.ndarray, noise_N: np.ndarray, snr: float) -> np.ndarray:
    """Adds noise so that the audio has `snr` dB more power than it. Silent noise adds nothing."""
    noise_power = np.square(noise_N).mean()
    if noise_power == 0:
        return audio_N
    gain = np.sqrt(np.square(audio_N).mean() / (noise_power * 10 ** (snr / 10)))
    return (audio_N + gain * noise_N).astype(np.float32)


def reverberate(audio_N: np.ndarray, impulse_K: np.ndarray) -> np.ndarray:
    """Convolves with a room's impulse response; length, onset and power stay as they are.

    The response's loudest sample, the direct path, becomes time 0.
    """
    onset = int(np.abs(impulse_K).argmax())
    wet = scipy.signal.oaconvolve(audio_N, impulse_K)[onset : onset + len(audio_N)]
    power = np.square(wet).mean()
    if power == 0:
        return audio_N
    return (wet * np.sqrt(np.square(audio_N).mean() / power)).astype(np.float32)


def augment(
    audio_N: np.ndarray,
    rng: np.random.Generator,
    config,
    noises: Sequence[Utterance],
    impulses: Sequence[Utterance],
) -> np.ndarray:
    """Puts the audio into a random room and random noise, each with its probability.

    Args:
      audio_N: float32 [N] at 16 kHz.
      rng: decides everything.
      config: rir_prob, noise_prob, noise_snr (lowest, highest, in dB).
      noises, impulses: recordings of noise and room impulse responses; either may be empty.

    Returns:
      float32 [N].
    """
    if impulses and rng.random() < config.rir_prob:
        audio_N = reverberate(audio_N, _read(impulses[rng.integers(len(impulses))]))
    if noises and rng.random() < config.noise_prob:
        recording = _read(noises[rng.integers(len(noises))])
        start = rng.integers(len(recording))
        noise_N = np.resize(np.roll(recording, -start), len(audio_N))
        audio_N = add_noise(audio_N, noise_N, rng.uniform(*config.noise_snr))
    return audio_N


@functools.lru_cache(maxsize=256)
def _read(recording: Utterance) -> np.ndarray:
    return load_audio(recording)


def spec_augment(key: jax.Array, mel_BFM: jax.Array, mel_length_B: jax.Array, config) -> jax.Array:
    """Masks random spans of frames and of mel bins with the utterance's mean.

    Args:
      key: PRNG key of the step.
      mel_BFM: float [B, F, M]; frames from mel_length_B on may be anything and stay as they are.
      mel_length_B: int32 [B].
      config: time_masks, time_width (most frames a mask; never over a fifth of the utterance),
        freq_masks, freq_width (most bins a mask).

    Returns:
      Like mel_BFM.

    Reference: Park et al. 2019, "SpecAugment".
    """
    batch, frames, bins = mel_BFM.shape
    time_key, freq_key = jax.random.split(key)

    def spans(key, count, width_B, length_B, size):
        """bool [B, size]: inside any of `count` spans of 0 … width positions below length."""
        width_key, start_key = jax.random.split(key)
        widest_B1 = width_B[:, None].astype(jnp.float32)
        width_BC = jnp.floor(jax.random.uniform(width_key, (batch, count)) * (widest_B1 + 1))
        room_BC = length_B[:, None].astype(jnp.float32) - width_BC + 1
        start_BC = jnp.floor(jax.random.uniform(start_key, (batch, count)) * room_BC)
        position = jnp.arange(size, dtype=jnp.float32)[None, None]
        after = position >= start_BC[..., None]
        return (after & (position < (start_BC + width_BC)[..., None])).any(axis=1)

    valid_BF1 = (jnp.arange(frames)[None] < mel_length_B[:, None])[..., None]
    total_B = jnp.where(valid_BF1, mel_BFM, 0).sum(axis=(1, 2), dtype=jnp.float32)
    mean_B = total_B / (jnp.maximum(mel_length_B, 1) * bins).astype(jnp.float32)
    widest_B = jnp.minimum(config.time_width, mel_length_B // 5)
    time_BF = spans(time_key, config.time_masks, widest_B, mel_length_B, frames)
    bins_B = jnp.full(batch, bins)
    freq_BM = spans(freq_key, config.freq_masks, jnp.full(batch, config.freq_width), bins_B, bins)
    masked_BFM = (time_BF[..., None] | freq_BM[:, None]) & valid_BF1
    return jnp.where(masked_BFM, mean_B[:, None, None].astype(mel_BFM.dtype), mel_BFM)
