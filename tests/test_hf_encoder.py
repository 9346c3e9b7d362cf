"""The speech encoder against transformers' Whisper, on tiny random models it saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from otreg_jax import pretrained


@pytest.mark.parametrize("num_mels, frames", [(80, 82), (128, 53)])
def test_matches_whisper_and_round_trips(num_mels, frames, tmp_path):
    torch.manual_seed(0)
    positions = -(-frames // 2)
    config = transformers.WhisperConfig(
        vocab_size=60,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        num_mel_bins=num_mels,
        max_source_positions=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    whisper = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in whisper.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    whisper.save_pretrained(tmp_path / "hf")
    # transformers takes full length only: the reference is the same model cut to our positions.
    reference = whisper.model.encoder
    reference.embed_positions = torch.nn.Embedding.from_pretrained(
        reference.embed_positions.weight[:positions]
    )
    mel = torch.randn(2, num_mels, frames)
    reference.config.max_source_positions = positions
    if frames % 2:  # its check wants an even length; its convolutions do not
        with torch.no_grad():
            expected = _encode(reference, mel)
    else:
        with torch.no_grad():
            expected = reference(mel).last_hidden_state

    encoder, params = pretrained.load_speech_encoder(tmp_path / "hf")
    mel_BFM = jnp.asarray(mel.numpy().transpose(0, 2, 1))
    features, length = jax.jit(encoder.apply)(
        {"params": params}, mel_BFM, jnp.array([frames, frames])
    )
    np.testing.assert_array_equal(length, [positions, positions])
    np.testing.assert_allclose(features, expected, atol=1e-4, rtol=0)

    pretrained.save_speech_encoder(tmp_path / "back", encoder, params)
    first = load_file(tmp_path / "hf/model.safetensors")
    prefix = "model.encoder."
    first = {k.removeprefix(prefix): v for k, v in first.items() if k.startswith(prefix)}
    back = load_file(tmp_path / "back/model.safetensors")
    assert set(first) == set(back)
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, back[name], err_msg=name)
    # What was written opens on its own, on both sides.
    reopened = WhisperEncoder.from_pretrained(tmp_path / "back").eval()
    mel = torch.randn(1, num_mels, 100)
    with torch.no_grad():
        expected = reopened(mel).last_hidden_state
    encoder, params = pretrained.load_speech_encoder(tmp_path / "back")
    mel_BFM = jnp.asarray(mel.numpy().transpose(0, 2, 1))
    features, _ = jax.jit(encoder.apply)({"params": params}, mel_BFM, jnp.array([100]))
    np.testing.assert_allclose(features, expected, atol=1e-4, rtol=0)


def _encode(encoder, mel):
    """transformers' encoder without its check of the input length."""
    x = torch.nn.functional.gelu(encoder.conv1(mel))
    x = torch.nn.functional.gelu(encoder.conv2(x)).permute(0, 2, 1)
    x = x + encoder.embed_positions.weight
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)
