"""What speech encoders read: frames of 10 ms, made on the host (NumPy) or in the jitted step (jnp).

A frame is a column of a log-mel spectrogram as Whisper computes it or, for encoders that read the
waveform, its 160 samples; silence fills up the last one. So all audio is counted in frames.

Whisper pads every recording to 30 s with zeros before its STFT. Neither form here does, and yet
the frames that hold speech come out the same: the end of the audio is extended with zeros, not by
reflection, and the floor lies 8 (log10) below the loudest frame that touches any audio.

Reference: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", 2.2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
import scipy.sparse

from otreg_jax.data.utterances import SAMPLE_RATE

PLACES = ("host", "step")  # where frames are made: on the host, or inside the jitted step
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
FRAME_RATE = SAMPLE_RATE // HOP  # frames a second
# Frames centred on or after the last sample whose window still reaches back into the audio.
TAIL = -(-(WINDOW // 2) // HOP)


class Frontend(NamedTuple):
    """What an encoder reads, `width` numbers a frame: "log_mel" (bins), or "waveform" (samples)."""

    kind: str = "log_mel"
    width: int = 80


LOG_MEL, WAVEFORM = Frontend(), Frontend("waveform", HOP)


def num_frames(num_samples):
    """Frames of 10 ms that cover `num_samples` samples (works on ints and on arrays)."""
    return -(-num_samples // HOP)


def _hz_to_mel(hz):
    """Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    hz = np.asarray(hz, np.float64)
    return np.where(
        hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4)
    )


def _mel_to_hz(mel):
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


@functools.cache
def mel_filters(num_mels: int = 80, fft_size: int = WINDOW) -> np.ndarray:
    """Triangles of equal area on Slaney's mel scale, float32 [fft_size // 2 + 1, num_mels]."""
    bins_hz = np.arange(fft_size // 2 + 1) * SAMPLE_RATE / fft_size
    edges_hz = _mel_to_hz(np.linspace(0, _hz_to_mel(SAMPLE_RATE / 2), num_mels + 2))
    lower, centre, upper = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising = (bins_hz[:, None] - lower) / (centre - lower)
    falling = (upper - bins_hz[:, None]) / (upper - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * 2 / (upper - lower)).astype(np.float32)


@functools.cache
def _window() -> np.ndarray:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


@functools.cache
def _sparse_filters(num_mels: int) -> scipy.sparse.csr_array:
    """[num_mels, bins], 1 % not zero: no threaded BLAS to contend with the model for cores."""
    return scipy.sparse.csr_array(mel_filters(num_mels).T)


def log_mel(audio_N: np.ndarray, num_mels: int = 80) -> np.ndarray:
    """Whisper's log-mel features of one recording, on the host.

    Args:
      audio_N: float32 [N], 16 kHz mono in [-1, 1], at least one sample.
      num_mels: mel bins; Whisper uses 80, from large-v3 on 128.

    Returns:
      float32 [num_frames(N), num_mels].
    """
    frames = num_frames(len(audio_N))
    reach = WINDOW // 2
    padded = np.zeros(reach + (frames + TAIL) * HOP + reach, np.float32)
    padded[reach : reach + len(audio_N)] = audio_N
    padded[:reach] = padded[2 * reach : reach : -1]  # the start is mirrored, as in Whisper
    windows_FW = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: frames + TAIL]
    spectrum = scipy.fft.rfft(windows_FW * _window(), axis=-1)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    mel_FM = (_sparse_filters(num_mels) @ power.T).T
    log_FM = np.log10(np.maximum(mel_FM, np.float32(1e-10)))
    return (np.maximum(log_FM[:frames], log_FM.max() - np.float32(8)) + np.float32(4)) / 4


def log_mel_jnp(
    audio_BN: jax.Array, length_B: jax.Array, num_mels: int = 80
) -> tuple[jax.Array, jax.Array]:
    """`log_mel` for a padded batch, inside a jitted function.

    Args:
      audio_BN: float32 or int16 [B, N] at 16 kHz; samples from length_B on may be anything.
      length_B: int32 [B], valid samples.
      num_mels: mel bins.

    Returns:
      float32 [B, num_frames(N), num_mels], zero from its length on; int32 [B] lengths in frames.
    """
    if audio_BN.dtype == jnp.int16:
        audio_BN = audio_BN.astype(jnp.float32) / 32768
    _, samples = audio_BN.shape
    frames, reach = num_frames(samples), WINDOW // 2
    audio_BN = jnp.where(jnp.arange(samples)[None] < length_B[:, None], audio_BN, 0)
    room = (frames + TAIL) * HOP + reach - samples
    audio_BN = jnp.pad(audio_BN, ((0, 0), (0, room)))
    padded = jnp.concatenate([audio_BN[:, reach:0:-1], audio_BN], axis=1)
    starts_F1 = jnp.arange(frames + TAIL)[:, None] * HOP
    windows_BFW = padded[:, starts_F1 + jnp.arange(WINDOW)[None]] * _window()[None, None]
    spectrum = jnp.fft.rfft(windows_BFW)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    mel_BFM = jnp.matmul(power, mel_filters(num_mels), precision=jax.lax.Precision.HIGHEST)
    log_BFM = jnp.log10(jnp.maximum(mel_BFM, 1e-10))
    mel_length_B = num_frames(length_B)
    # Frames past length + TAIL hold only zeros, the smallest value there is: never the peak.
    peak_B11 = log_BFM.max(axis=(1, 2), keepdims=True)
    log_BFM = (jnp.maximum(log_BFM[:, :frames], peak_B11 - 8) + 4) / 4
    valid_BF1 = (jnp.arange(frames)[None] < mel_length_B[:, None])[..., None]
    return jnp.where(valid_BF1, log_BFM, 0), mel_length_B.astype(jnp.int32)


def frames(frontend: Frontend, audio_N: np.ndarray) -> np.ndarray:
    """The frames of one recording, on the host: float32 [N] to float32 [num_frames(N), width]."""
    if frontend.kind == "log_mel":
        return log_mel(audio_N, frontend.width)
    return np.pad(audio_N, (0, -len(audio_N) % HOP)).reshape(-1, HOP)


def frames_jnp(
    frontend: Frontend, audio_BN: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`frames` of a padded batch, inside a jitted function; arguments and result as `log_mel_jnp`,
    the last axis as wide as the frontend."""
    if frontend.kind == "log_mel":
        return log_mel_jnp(audio_BN, length_B, frontend.width)
    if audio_BN.dtype == jnp.int16:
        audio_BN = audio_BN.astype(jnp.float32) / 32768
    rows, samples = audio_BN.shape
    audio_BN = jnp.where(jnp.arange(samples)[None] < length_B[:, None], audio_BN, 0)
    audio_BN = jnp.pad(audio_BN, ((0, 0), (0, -samples % HOP)))
    return audio_BN.reshape(rows, -1, HOP), num_frames(length_B).astype(jnp.int32)


def heard(frontend: Frontend, frames_FM: np.ndarray) -> np.ndarray:
    """Log-mel [F, bins] of one recording's frames of any frontend, on the host: what reports show,
    and where silence is found."""
    return frames_FM if frontend.kind == "log_mel" else log_mel(frames_FM.reshape(-1))


def heard_jnp(frontend: Frontend, frames_BFM: jax.Array, length_B: jax.Array) -> jax.Array:
    """`heard` of a padded batch, inside a jitted function: float32 [B, F, bins]."""
    if frontend.kind == "log_mel":
        return frames_BFM
    return log_mel_jnp(frames_BFM.reshape(len(frames_BFM), -1), length_B * HOP)[0]
