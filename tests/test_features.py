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


@pytest.mark.parametrize("num_mels", [80, 128])
def test_inside_the_step_equals_the_host_whatever_the_padding_holds(num_mels):
    lengths = np.array([7999, 16000, 1, 12345], np.int32)
    audio_BN = np.full((4, 16000), np.nan, np.float32)
    for i, length in enumerate(lengths):
        audio_BN[i, :length] = speech_like(length, seed=i)
    mel_BFM, mel_length = jax.jit(features.log_mel_jnp, static_argnums=2)(
        audio_BN, lengths, num_mels
    )
    assert mel_BFM.shape == (4, 100, num_mels) and mel_length.dtype == np.int32
    for i, length in enumerate(lengths):
        mel = features.log_mel(audio_BN[i, :length], num_mels)
        assert mel_length[i] == len(mel) == features.num_frames(int(length))
        np.testing.assert_allclose(mel_BFM[i, : len(mel)], mel, atol=1e-4)
        assert not np.any(mel_BFM[i, len(mel) :])


def test_silence_is_finite():
    assert np.isfinite(features.log_mel(np.zeros(1000, np.float32))).all()
