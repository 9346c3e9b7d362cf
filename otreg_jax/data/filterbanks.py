"""Filter banks of speech encoders that compute their own from the waveform, inside a jitted step.

Each encoder was trained on those of one toolkit; they differ in scale, window and emphasis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from otreg_jax.data import features
from otreg_jax.data.features import HOP, WINDOW
from otreg_jax.data.utterances import SAMPLE_RATE

FFT = 512
EMPHASIS = 0.97  # of high frequencies: x[n] - 0.97 x[n - 1]


def kaldi(audio_BN: jax.Array, length_B: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Log energies in Kaldi's filter bank (compute-fbank-feats without dither), which w2v-BERT 2.0
    reads, brought to zero mean and unit variance, bin by bin.

    Args:
      audio_BN: float32 [B, N] at 16 kHz, at least 400 samples, zero from length_B on.
      length_B: int32 [B], valid samples, at least 400.
      bins: filters.

    Returns:
      float32 [B, F, bins], zero from its length on; int32 [B] lengths, whole windows of 25 ms every
      10 ms.
    """
    windows_BFW = _windows(audio_BN * 2**15, WINDOW)
    windows_BFW = windows_BFW - windows_BFW.mean(axis=2, keepdims=True)
    before_BFW = jnp.concatenate([windows_BFW[..., :1], windows_BFW[..., :-1]], axis=2)
    windows_BFW = (windows_BFW - EMPHASIS * before_BFW) * _hann(WINDOW)[None, None] ** 0.85
    energy_BFM = _energy(windows_BFW, kaldi_filters(bins))
    log_BFM = jnp.log(jnp.maximum(energy_BFM, jnp.finfo(jnp.float32).eps))
    length_B = (length_B - WINDOW) // HOP + 1
    return _standardized(log_BFM, length_B, lambda variance: jnp.sqrt(variance + 1e-7)), length_B


def nemo(audio_BN: jax.Array, length_B: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """NeMo's log-mel spectrogram, which Parakeet reads, brought to zero mean and unit variance, bin
    by bin; arguments and result as for `kaldi`, but lengths: one frame every 10 ms."""
    before_BN = jnp.pad(audio_BN, ((0, 0), (1, 0)))[:, :-1]
    audio_BN = audio_BN - EMPHASIS * before_BN
    audio_BN = jnp.where(jnp.arange(audio_BN.shape[1])[None] < length_B[:, None], audio_BN, 0)
    reach, side = FFT // 2, (FFT - WINDOW) // 2
    windows_BFW = _windows(jnp.pad(audio_BN, ((0, 0), (reach, reach))), FFT)
    window = jnp.pad(_hann(WINDOW), (side, side))
    energy_BFM = _energy(windows_BFW * window[None, None], features.mel_filters(bins, FFT))
    log_BFM = jnp.log(energy_BFM + 2.0**-24)[:, : audio_BN.shape[1] // HOP]
    length_B = length_B // HOP
    return _standardized(log_BFM, length_B, lambda variance: jnp.sqrt(variance) + 1e-5), length_B


@functools.cache
def kaldi_filters(bins: int) -> np.ndarray:
    """Triangles on Kaldi's mel scale, from 20 Hz up, float32 [FFT // 2 + 1, bins]."""
    mel = lambda hz: 1127 * np.log1p(np.asarray(hz) / 700)
    edges = np.linspace(mel(20), mel(SAMPLE_RATE / 2), bins + 2)
    centre = mel(np.arange(FFT // 2 + 1) * SAMPLE_RATE / FFT)[:, None]
    rising = (centre - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - centre) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def _hann(width: int) -> np.ndarray:
    return np.hanning(width).astype(np.float32)


def _windows(audio_BN: jax.Array, width: int) -> jax.Array:
    """[B, F, width]: the whole windows of this width, one every 10 ms."""
    starts_F1 = np.arange((audio_BN.shape[1] - width) // HOP + 1)[:, None] * HOP
    return audio_BN[:, starts_F1 + np.arange(width)[None]]


def _energy(windows_BFW: jax.Array, filters: np.ndarray) -> jax.Array:
    spectrum = jnp.fft.rfft(windows_BFW, FFT)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)


def _standardized(x_BFM: jax.Array, length_B: jax.Array, deviation) -> jax.Array:
    """Zero mean and unit variance over the valid frames, zero elsewhere."""
    valid_BF1 = (jnp.arange(x_BFM.shape[1])[None] < length_B[:, None])[..., None]
    count_B11 = length_B[:, None, None].astype(jnp.float32)
    total = lambda x: jnp.where(valid_BF1, x, 0).sum(axis=1, keepdims=True)
    x_BFM = x_BFM - total(x_BFM) / count_B11
    variance_B1M = total(jnp.square(x_BFM)) / jnp.maximum(count_B11 - 1, 1)
    return jnp.where(valid_BF1, x_BFM / deviation(variance_B1M), 0)
