"""Log-mel features against Whisper's own, and the two forms against each other."""

import jax
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from otreg_jax.data import features


def speech_like(samples, seed=0):
    rng = np.random.default_rng(seed)
    loudness = np.interp(np.arange(samples), np.linspace(0, samples, 9), rng.uniform(0, 0.3, 9))
    return (rng.standard_normal(samples) * loudness).astype(np.float32)


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("samples", [201, 16000, 48037])
def test_equals_whisper_on_the_frames_that_hold_speech(num_mels, samples):
    audio = speech_like(samples)
    whisper = WhisperFeatureExtractor(feature_size=num_mels)
    padded = whisper(audio, sampling_rate=16000, return_tensors="np").input_features[0].T
    mel = features.log_mel(audio, num_mels)
    assert mel.dtype == np.float32 and mel.shape == (-(-samples // 160), num_mels)
    np.testing.assert_allclose(mel, padded[: len(mel)], atol=1e-5)


def test_loud_end_sets_the_floor_as_in_whisper():
    # The loudest window is one that is centred after the last sample.
    audio = np.full(1600, 1e-5, np.float32)
    audio[-40:] = 1.0
    whisper = WhisperFeatureExtractor()(audio, sampling_rate=16000, return_tensors="np")
    mel = features.log_mel(audio)
    np.testing.assert_allclose(mel, whisper.input_features[0].T[: len(mel)], atol=1e-5)


@pytest.mark.parametrize(
    "frontend", [features.LOG_MEL, features.Frontend(width=128), features.WAVEFORM]
)
def test_inside_the_step_equals_the_host_whatever_the_padding_holds(frontend):
    lengths = np.array([7999, 16000, 1, 12345], np.int32)
    audio_BN = np.full((4, 16000), np.nan, np.float32)
    for i, length in enumerate(lengths):
        audio_BN[i, :length] = speech_like(length, seed=i)
    in_step = jax.jit(features.frames_jnp, static_argnums=0)
    frames_BFM, num_frames = in_step(frontend, audio_BN, lengths)
    assert frames_BFM.shape == (4, 100, frontend.width) and num_frames.dtype == np.int32
    for i, length in enumerate(lengths):
        frames = features.frames(frontend, audio_BN[i, :length])
        assert num_frames[i] == len(frames) == features.num_frames(int(length))
        np.testing.assert_allclose(frames_BFM[i, : len(frames)], frames, atol=1e-4)
        assert not np.any(frames_BFM[i, len(frames) :])


def test_log_mel_is_heard_in_the_waveform():
    audio_N, lengths = speech_like(3 * 1600), np.array([30, 17])
    whole = features.frames(features.WAVEFORM, audio_N)
    heard = jax.jit(features.heard_jnp, static_argnums=0)
    frames = np.stack([whole, np.where(np.arange(30)[:, None] < 17, whole, np.nan)])
    both = heard(features.WAVEFORM, frames, lengths)
    for length, found in zip(lengths, both, strict=True):
        mel = features.log_mel(audio_N[: length * features.HOP])
        np.testing.assert_array_equal(features.heard(features.WAVEFORM, whole[:length]), mel)
        np.testing.assert_allclose(found[:length], mel, atol=1e-4)


def test_silence_is_finite():
    assert np.isfinite(features.log_mel(np.zeros(1000, np.float32))).all()
