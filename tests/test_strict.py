"""No array is broadcast to another rank or promoted to another dtype unless the code says so; and a
step in bfloat16 with everything on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import toy_batch, toy_config, toy_slm

from otreg_jax import build, losses, optim, otreg, train_step
from otreg_jax.models import lora
from otreg_jax.models.adapter import KINDS, Adapter, AdapterConfig
from otreg_jax.models.block import WideHeads
from otreg_jax.models.delta import DeltaHeads
from otreg_jax.models.llm import LLM, LLMConfig, init_cache
from otreg_jax.models.rope import RopeScaling

ALL = dict(
    otreg__weight=1.0,
    otreg__layer=1,
    otreg__center="mean",
    otreg__position_weight=1.0,
    ctc__weight=0.3,
)
LORA = dict(lora__pattern="llm/layers/attn/[qv]/kernel", freeze=r"^(encoder|llm)/(?!.*/lora_[ab]$)")


@pytest.fixture
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def make_step(optimizer=None, **changes):
    """(state, frozen, step) of the toy model as a configuration asks for it."""
    c = toy_config(**changes)
    slm, params = toy_slm(
        ctc=bool(c.ctc.weight), dtype=c.compute_dtype, remat=c.remat, dropout=c.adapter.dropout
    )
    if c.lora.pattern:
        params = lora.add(params, c.lora.pattern, 4, jax.random.key(1))
    trained, frozen = build.split(params, c)
    frozen |= build.text_target(trained, c)
    optimizer = optimizer or optim.make_optimizer(c)

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):  # optax has its own ways
            return optimizer.update(*args)

    step = functools.partial(
        train_step.train_step,
        slm=slm,
        config=c,
        schedules=losses.make_schedules(c),
        optimizer=optax.GradientTransformation(optimizer.init, update),
    )
    return train_step.init_state(trained, optimizer), frozen, step


@pytest.mark.parametrize(
    "changes",
    [
        dict(otreg__text_set="unique", otreg__center="pcs", infonce__weight=0.1),
        dict(accumulation=2, at_a_time=48, adapter__dropout=0.1, optim__ema_decay=0.9),
        dict(compute_dtype="bfloat16", remat="dots", data__augment__time_masks=2, **LORA),
        dict(compute_dtype="bfloat16", remat="full", frozen_int8=True, at_a_time=48, **LORA),
        dict(freeze="^encoder/", llm__pretrain__num_steps=1, data__features="step"),
    ],
    ids=str,
)
def test_a_step_promotes_nothing(changes, monkeypatch, request):
    changes = dict(changes)
    if at_a_time := changes.pop("at_a_time", 0):
        monkeypatch.setattr(losses.common, "LOGITS_AT_A_TIME", at_a_time)
    state, frozen, step = make_step(data__num_mels=8, **(ALL | changes))
    batch = toy_batch(8)
    if changes.get("data__features") == "step":
        del batch["mel"], batch["mel_length"]
        batch |= {"audio": np.zeros((8, 6400), np.float32), "audio_length": np.full(8, 6400)}
    request.getfixturevalue("strict")
    jax.eval_shape(step, state, frozen, batch)


@pytest.mark.parametrize("backend", otreg.BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        dict(text_set="unique", text_mass="count", cost="sqeuclidean"),
        dict(center="pcs", speech_tau=0.5),
        dict(plan="position", position_weight=1.0),
    ],
    ids=str,
)
def test_the_method_promotes_nothing(options, backend, request):
    def loss(speech, text, speech_mask, text_mask, ids):
        return otreg.regularizer(
            speech, text, speech_mask, text_mask, token_ids_BT=ids, backend=backend, **options
        ).loss

    shape = jax.ShapeDtypeStruct
    speech, text = shape((2, 9, 8), jnp.bfloat16), shape((2, 4, 8), jnp.float32)
    rest = shape((2, 9), bool), shape((2, 4), bool), shape((2, 4), jnp.int32)
    if backend != "ott":  # ott-jax has its own ways
        request.getfixturevalue("strict")
    assert jax.eval_shape(jax.grad(loss), speech, text, *rest).dtype == jnp.bfloat16


@pytest.mark.parametrize("at_a_time", [2**21, 12])
def test_ctc_over_some_classes_promotes_nothing(at_a_time, monkeypatch, strict):
    monkeypatch.setattr(losses.common, "LOGITS_AT_A_TIME", at_a_time)
    ctc = losses.init_ctc(jax.random.key(0), 8, 10.0, 10, np.array([1, 4, 7]))
    speech, table = jnp.ones((2, 9, 8), jnp.bfloat16), jnp.ones((10, 8))
    tokens, mask = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool)
    jax.eval_shape(losses.ctc_loss, speech, jnp.array([9, 7]), tokens, mask, table, ctc)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_promote_nothing(kind, dtype, strict):
    norm = "table" if kind == "mlp" else "none"
    adapter = Adapter(AdapterConfig(8, 12, 16, kind, dtype=dtype, num_heads=2, norm=norm))
    speech, _ = jax.eval_shape(
        adapter.init_with_output, jax.random.key(0), jnp.zeros((2, 10, 8)), jnp.array([10, 7])
    )[0]
    assert speech.dtype == dtype


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"wide": WideHeads(4, 1, value_is_key=True)},
        {"delta": DeltaHeads(1, 2, 4, 6, 3), "sliding_window": None, "local_rope_theta": None},
    ],
    ids=["one shape", "wide", "linear"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llms_promote_nothing(dtype, shapes, strict):
    """Everything that a family may have at once, whole sequences and steps over a cache."""
    config = LLMConfig(
        vocab_size=24,
        embed_dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=24,
        tied_head=False,
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        qkv_bias=True,
        embed_scale=4.0,
        attn_softcap=50.0,
        logit_softcap=30.0,
        sliding_window=3,
        local_layers=(True, False),
        local_rope_theta=1e3,
        rope_scaling=RopeScaling("yarn", 4.0, 64, query_beta=0.1),
        rotary_dim=4,
        residual_scale=0.5,
        logit_divisor=2.0,
        gated=True,
        value_norm=True,
        layer_scalar=True,
        remat="dots",
        dtype=dtype,
    )
    config = dataclasses.replace(config, **shapes)
    model, tokens = LLM(config), jnp.zeros((2, 5), jnp.int32)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)
    assert logits.dtype == jnp.float32

    def step(variables):
        x = model.apply(variables, tokens, method="embed")
        cache = init_cache(config, 2, 6)
        _, cache = model.apply(variables, x, None, cache, jnp.array([3, 5]), method="hidden")
        return model.apply(variables, x[:, :1], jnp.array([[3], [5]]), cache, method="hidden")

    assert jax.eval_shape(step, variables)[0].dtype == dtype


def test_a_bfloat16_step_with_everything_on_is_close_to_float32():
    """Remat, LoRA, CTC and OTReg. bfloat16 rounds by up to 2**-9, some tens of times between audio
    and loss, up and down: within 2**-6 of what float32 computes."""
    results = {}
    for dtype, remat in (("float32", "none"), ("bfloat16", "dots")):
        changes = dict(compute_dtype=dtype, remat=remat) | LORA | ALL
        state, frozen, step = make_step(optax.sgd(1.0), **changes)
        params = state.params
        for pair in params["llm"]["layers"]["attn"].values():  # 0 would leave lora_a no gradient
            pair["lora_b"] = 0.1 * jax.random.normal(jax.random.key(2), pair["lora_b"].shape)
        after, metrics = jax.jit(step)(state, frozen, toy_batch(8))
        gradient = jax.tree.map(lambda old, new: np.asarray(old - new), params, after.params)
        results[dtype] = metrics, optim.flat_paths(gradient), frozen
    metrics, gradient, frozen = results["bfloat16"]
    exact, exact_gradient, _ = results["float32"]
    for name in ("loss", "ce", "otreg", "ctc", "grad_norm"):
        np.testing.assert_allclose(metrics[name], exact[name], rtol=2**-6, err_msg=name)
    pairs = {f"llm/layers/attn/{name}/lora_{side}" for name in "qv" for side in "ab"}
    assert pairs == {path for path in gradient if path.startswith(("llm", "encoder"))}
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(frozen))
    for path, wanted in exact_gradient.items():
        size = np.linalg.norm(wanted)
        assert size > 0 and np.linalg.norm(gradient[path] - wanted) <= 0.1 * size, path
