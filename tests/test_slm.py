"""The composed model: packing, padding invariance, causality, layer k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_batch, toy_slm

from otreg_jax.models import slm as slm_lib


@pytest.fixture(scope="module")
def model():
    return toy_slm()


@pytest.fixture(scope="module")
def forward(model):
    """(batch, layer) -> (outputs, logits)."""
    slm, params = model

    def run(batch, layer):
        out = slm_lib.forward(slm, params, batch, layer)
        return out, slm_lib.logits(slm, params, out.hidden_BTD)

    return jax.jit(run, static_argnums=1)


def test_assemble_packs_prompt_speech_and_transcript_without_gaps(model):
    slm, params = model
    speech = jnp.arange(2 * 5 * 16, dtype=jnp.float32).reshape(2, 5, 16)
    text = -1.0 - jnp.arange(2 * 3 * 16, dtype=jnp.float32).reshape(2, 3, 16)
    x, start = slm_lib.assemble(slm, params, speech, jnp.array([5, 2]), text)
    prefix, suffix = (
        slm_lib.embed(slm, params, jnp.array(ids)) for ids in (slm.prompt.prefix, slm.prompt.suffix)
    )
    for row, length in ((0, 5), (1, 2)):
        wanted = np.concatenate([prefix, speech[row, :length], suffix, text[row]])
        np.testing.assert_array_equal(x[row, : len(wanted)], wanted)
        assert start[row] == len(prefix) + length + len(suffix) - 1


def test_padding_of_audio_and_text_never_matters(forward):
    batch = toy_batch()
    wide = dict(batch)
    wide["mel"] = jnp.pad(batch["mel"], ((0, 0), (0, 24), (0, 0)), constant_values=jnp.nan)
    wide["tokens"] = jnp.pad(batch["tokens"], ((0, 0), (0, 3)), constant_values=7)
    narrow_out, narrow_logits = forward(batch, 1)
    wide_out, wide_logits = forward(wide, 1)
    for row in range(4):
        n = int(batch["token_length"][row]) + 1
        np.testing.assert_allclose(narrow_logits[row, :n], wide_logits[row, :n], atol=1e-5)
        s = int(narrow_out.speech_length_B[row])
        np.testing.assert_allclose(
            narrow_out.speech_BSD[row, :s], wide_out.speech_BSD[row, :s], atol=1e-5
        )
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        alone["mel"] = alone["mel"][:, : int(batch["mel_length"][row])]
        _, alone_logits = forward(alone, 1)
        np.testing.assert_allclose(narrow_logits[row, :n], alone_logits[0, :n], atol=1e-5)


def test_a_prediction_sees_the_speech_and_earlier_tokens_only(model):
    """Causality by gradient, through the packing and the LLM."""
    slm, params = model
    batch = toy_batch()
    embeddings = jax.jit(slm_lib.speech_embeddings, static_argnums=0)
    speech, length = embeddings(slm, params, batch["mel"], batch["mel_length"])
    text = slm_lib.embed(slm, params, batch["tokens"])

    def prediction(speech, text):
        x, start = slm_lib.assemble(slm, params, speech, length, text)
        hidden, _ = slm.llm.apply({"params": params["llm"]}, x, method="hidden")
        predicting = slm_lib.predicting(hidden, start, text.shape[1] + 1)
        return jnp.sum(jnp.sin(slm_lib.logits(slm, params, predicting)[:, 2]))

    by_speech, by_text = jax.jit(jax.grad(prediction, argnums=(0, 1)))(speech, text)
    for row in range(4):
        valid = np.abs(by_speech[row]).sum(axis=-1) > 0
        np.testing.assert_array_equal(valid, np.arange(speech.shape[1]) < length[row])
    moved = np.abs(by_text).sum(axis=(0, 2)) > 0
    np.testing.assert_array_equal(moved[:4], [True, True, False, False])


def test_layer_k_compares_hidden_states_with_the_transcript_alone(model, forward):
    slm, params = model
    batch = toy_batch()
    at_zero, logits_zero = forward(batch, 0)
    at_one, logits_one = forward(batch, 1)
    np.testing.assert_allclose(logits_zero, logits_one, atol=1e-5)
    np.testing.assert_array_equal(at_zero.text_BTD, slm_lib.embed(slm, params, batch["tokens"]))
    assert not np.allclose(at_one.text_BTD, at_zero.text_BTD, atol=1e-2)
    np.testing.assert_array_equal(at_one.adapted_BSD, at_zero.speech_BSD)
    text_sum = lambda p: slm_lib.forward(slm, p, batch, layer=1).text_BTD.sum()
    gradient = jax.jit(jax.grad(text_sum))(params)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))
