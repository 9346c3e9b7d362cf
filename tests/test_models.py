"""LLM and speech encoder: causality, caching, padding, dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from otreg_jax import flops
from otreg_jax.models import delta as delta_lib
from otreg_jax.models.block import WideHeads
from otreg_jax.models.delta import DeltaHeads
from otreg_jax.models.llm import LLM, LLMConfig, init_cache, sublayers
from otreg_jax.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig, output_length

PLAIN = LLMConfig(
    vocab_size=40, embed_dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32
)
WINDOWED = dataclasses.replace(
    PLAIN,
    tied_head=False,
    sliding_window=3,
    local_layers=(True, False, True),
    local_rope_theta=100.0,
    attn_softcap=5.0,
    qk_norm=True,
)
MIXED = dataclasses.replace(  # layers of two shapes
    WINDOWED,
    attn_softcap=None,
    wide=WideHeads(head_dim=12, num_kv_heads=1, value_is_key=True),
    value_norm=True,
    layer_scalar=True,
)
LINEAR = dataclasses.replace(
    WINDOWED,
    norm_eps=1e-2,  # a state that was forgotten at once is nearly nothing, which a norm blows up
    attn_softcap=None,
    sliding_window=None,
    local_rope_theta=None,
    gated=True,
    delta=DeltaHeads(num_key_heads=1, num_value_heads=2, key_dim=4, value_dim=6, conv_width=3),
)
TOKENS_BL = jax.random.randint(jax.random.key(1), (2, 9), 0, 40)


def _init(config):
    model = LLM(config)
    return model, jax.jit(model.init)(jax.random.key(0), TOKENS_BL)["params"]


@pytest.fixture(
    scope="module",
    params=[PLAIN, WINDOWED, MIXED, LINEAR],
    ids=["plain", "windowed", "mixed", "linear"],
)
def llm(request):
    return _init(request.param)


@pytest.fixture(
    scope="module", params=[WINDOWED, MIXED, LINEAR], ids=["windowed", "mixed", "linear"]
)
def windowed(request):
    return _init(request.param)


def test_llm_is_causal_and_sees_all_that_went_before(llm):
    model, params = llm
    x_BLD = model.apply({"params": params}, TOKENS_BL, method="embed")

    def out(x_BLD):
        return model.apply({"params": params}, x_BLD, method="hidden")[0]

    # Which inputs each output depends on: the Jacobian's block norms.
    jacobian = jax.jit(jax.jacobian(lambda x: out(x)[0].sum(-1)))(x_BLD)[:, 0]
    reach = np.asarray(jnp.abs(jacobian).sum(-1)) > 0
    np.testing.assert_array_equal(reach, np.tril(np.ones((9, 9), bool)))


def test_sliding_window_hides_what_is_behind_it():
    config = dataclasses.replace(PLAIN, num_layers=1, sliding_window=3)
    model = LLM(config)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS_BL)["params"]
    x_BLD = model.apply({"params": params}, TOKENS_BL, method="embed")
    hidden = jax.jit(lambda x: model.apply({"params": params}, x, method="hidden")[0])
    changed = jnp.abs(hidden(x_BLD.at[:, 2].add(1.0)) - hidden(x_BLD)).max((0, 2))
    np.testing.assert_array_equal(changed > 0, [i in (2, 3, 4) for i in range(9)])


def test_prefill_and_steps_at_different_positions_match_the_full_forward(llm):
    model, params = llm
    variables = {"params": params}
    full = jax.jit(model.apply)(variables, TOKENS_BL)
    lengths = np.array([5, 3])  # right-padded prompts of different lengths
    x_BLD = model.apply(variables, TOKENS_BL, method="embed")
    hidden = jax.jit(lambda *args: model.apply(variables, *args, method="hidden"))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    cache = init_cache(model.config, batch=2, length=9)
    prompt, cache = hidden(x_BLD[:, :5], positions, cache, lengths)
    for row, length in enumerate(lengths):
        logits = model.apply(variables, prompt[row, :length], method="logits")
        np.testing.assert_allclose(logits, full[row, :length], atol=1e-5)
    for offset in range(4):
        positions = (lengths + offset)[:, None]
        x = jnp.take_along_axis(x_BLD, positions[..., None], axis=1)
        step, cache = hidden(x, jnp.asarray(positions), cache)
        logits = model.apply(variables, step[:, 0], method="logits")
        for row in range(2):
            np.testing.assert_allclose(logits[row], full[row, lengths[row] + offset], atol=1e-5)


def test_llm_padding_never_matters(windowed):
    model, params = windowed
    apply = jax.jit(model.apply)
    batch = apply({"params": params}, TOKENS_BL)
    alone = apply({"params": params}, TOKENS_BL[1:, :4])
    np.testing.assert_allclose(batch[1, :4], alone[0], atol=1e-5)


def test_sublayers_compose_to_the_whole(windowed):
    model, params = windowed
    x_BLD = model.apply({"params": params}, TOKENS_BL, method="embed")

    def hidden(model, params, x_BLD):
        apply = jax.jit(lambda p, x: model.apply({"params": p}, x, method="hidden")[0])
        return apply(params, x_BLD)

    tap = jax.jit(lambda p, x: model.apply({"params": p}, x, (1,), method="hidden_and_taps"))
    whole, (tapped,) = tap(params, x_BLD)
    np.testing.assert_allclose(whole, hidden(model, params, x_BLD), atol=1e-5)
    for start, stop in ((0, 0), (0, 1), (1, 3)):
        x_BLD = hidden(*sublayers(model, params, start, stop), x_BLD)
        if stop == 1:
            np.testing.assert_allclose(x_BLD, tapped, atol=1e-5)
    np.testing.assert_allclose(x_BLD, whole, atol=1e-5)


def test_chunks_of_a_linear_layer_give_what_its_steps_give():
    """More positions than a chunk has, and not a whole number of chunks."""
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(2, 21, 3, n)), jnp.float32) for n in (4, 4, 5))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    g = -jnp.asarray(draw.exponential(size=(2, 21, 3)), jnp.float32)
    beta = jnp.asarray(draw.uniform(size=(2, 21, 3)), jnp.float32)

    def one(state, at):
        out, state = delta_lib.step(*at, state)
        return state, out

    by_position = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta)]
    state, out = jax.lax.scan(one, jnp.zeros((2, 4, 3, 5)), by_position)
    chunked, end = jax.jit(delta_lib.chunked, static_argnames="size")(q, k, v, g, beta, size=8)
    np.testing.assert_allclose(chunked, jnp.moveaxis(out, 0, 1), atol=1e-5)
    np.testing.assert_allclose(end, state, atol=1e-5)


@pytest.mark.parametrize(
    "remat, config",
    [
        ("full", dataclasses.replace(PLAIN, num_layers=2)),
        ("dots", dataclasses.replace(PLAIN, num_layers=2)),
        ("dots", LINEAR),
    ],
)
def test_remat_changes_no_gradient(remat, config):
    model, params = _init(config)
    again = LLM(dataclasses.replace(model.config, remat=remat))

    def grad(model):
        return jax.jit(jax.grad(lambda p: model.apply({"params": p}, TOKENS_BL).var()))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grad(model), grad(again))


def test_remat_repeats_as_much_as_its_policy_says():
    model, params = _init(PLAIN)

    def count(remat):
        apply = LLM(dataclasses.replace(model.config, remat=remat)).apply
        return flops.count(jax.grad(lambda p: apply({"params": p}, TOKENS_BL).var()), params)

    none, dots, full = count("none"), count("dots"), count("full")
    attention = 2 * 2 * 9 * 9 * 4 * 8 * 2 * 3  # q k and probabilities v, 2 rows, 3 layers
    assert dots - none == attention
    projections = 2 * 18 * 24 * (4 * 8 + 2 * 2 * 8 + 4 * 8 + 3 * 32) * 3
    assert 0.7 * projections < full - dots <= projections  # not those that no gradient needs


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits(windowed):
    model, params = windowed
    half = LLM(dataclasses.replace(model.config, dtype="bfloat16"))
    logits = jax.jit(half.apply)({"params": params}, TOKENS_BL)
    x_BLD = half.apply({"params": params}, TOKENS_BL, method="embed")
    assert (x_BLD.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    full = jax.jit(model.apply)({"params": params}, TOKENS_BL)
    # Some tens of roundings by up to 2**-9, up and down.
    assert np.sqrt(np.mean(np.square(logits - full))) <= 2**-6 * np.std(full)


def test_local_layers_must_match_the_layers():
    model = LLM(dataclasses.replace(WINDOWED, local_layers=(True,)))
    with pytest.raises(ValueError, match="1 entries for 3 layers"):
        model.init(jax.random.key(0), TOKENS_BL)


ENCODER = SpeechEncoderConfig(
    embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, num_mels=5, max_positions=20
)


def test_encoder_padding_never_matters():
    encoder = SpeechEncoder(dataclasses.replace(ENCODER, strides=(2, 2, 2)))
    mel_BFM = np.random.default_rng(0).normal(size=(3, 31, 5)).astype(np.float32)
    length_B = np.array([31, 14, 0], np.int32)
    params = jax.jit(encoder.init)(jax.random.key(0), mel_BFM, length_B)["params"]
    for row, length in enumerate(length_B):
        mel_BFM[row, length:] = np.nan

    def loss(params):
        features, positions_B = encoder.apply({"params": params}, mel_BFM, length_B)
        return features.var(), (features, positions_B)

    (_, (features, positions_B)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(positions_B, output_length(encoder.config, length_B))
    assert all(np.isfinite(leaf).all() for leaf in (features, *jax.tree.leaves(grads)))
    alone, _ = jax.jit(encoder.apply)({"params": params}, mel_BFM[1:2, :14], length_B[1:2])
    np.testing.assert_allclose(features[1, : positions_B[1]], alone[0], atol=1e-5)
    for row, end in enumerate(positions_B):
        assert not features[row, end:].any()


def test_encoder_refuses_more_frames_than_it_has_positions():
    with pytest.raises(ValueError, match="41 mel frames give 21 positions.*20"):
        SpeechEncoder(ENCODER).init(jax.random.key(0), jnp.zeros((1, 41, 5)), jnp.array([41]))
