"""The training step: golden metrics, freezing, devices, the non-finite guard, schedules."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_batch, toy_config, toy_slm

from otreg_jax import losses, optim, sharding, train_step

OTREG = dict(
    otreg__weight=1.0,
    otreg__layer=1,
    otreg__center="mean",
    otreg__position_weight=1.0,
    ctc__weight=0.3,
)

# Written down once: a change here changes every result.
GOLDEN = {"loss": 7.11325, "ce": 4.13637, "otreg": 0.99988, "ctc": 6.58999, "grad_norm": 8.11568}


@functools.lru_cache  # tests of one configuration share one compiled step
def make(axes=None, freeze="", **changes):
    """(state, frozen, jitted step) of the toy model, over a mesh of the sizes `axes` or on one
    device."""
    config = toy_config(**changes)
    mesh = axes and make_mesh(config, axes)
    slm, params = toy_slm(ctc=bool(config.ctc.weight), mesh=mesh)
    params, frozen = optim.split(params, freeze)
    optimizer = optim.make_optimizer(config)
    step = functools.partial(
        train_step.train_step,
        slm=slm,
        config=config,
        optimizer=optimizer,
        schedules=losses.make_schedules(config),
    )
    state = train_step.init_state(params, optimizer)
    if axes is None:
        return state, frozen, jax.jit(step)
    placed = sharding.tree_shardings(state, mesh)
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    return jax.device_put(state, placed), frozen, jax.jit(step, out_shardings=(placed, None))


def make_mesh(config, axes):
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = axes
    return sharding.make_mesh(config, jax.devices()[: math.prod(axes)])


def test_golden_metrics_of_one_step():
    state, frozen, step = make(**OTREG)
    _, metrics = step(state, frozen, toy_batch(8))
    for name, value in GOLDEN.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    "axes, accumulation, backend",
    [
        pytest.param((8, 1, 1), 1, "auto", marks=pytest.mark.shipped),
        ((1, 8, 1), 1, "auto"),
        pytest.param((2, 2, 2), 1, "pallas", marks=pytest.mark.shipped),
        ((2, 1, 1), 4, "pallas"),
        ((1, 2, 2), 2, "ott"),
    ],
)
def test_any_mesh_micro_batches_and_solver_give_what_one_device_gives(axes, accumulation, backend):
    """Also where rows have different numbers of tokens, none of them, or are filler."""
    one_state, frozen, one_step = make(**OTREG)
    changes = OTREG | {"otreg__backend": backend}
    state, mesh_frozen, step = make(axes, accumulation=accumulation, **changes)
    mesh = axes and make_mesh(toy_config(accumulation=accumulation), axes)
    for i in range(20):
        batch = toy_batch(8, seed=i)
        batch["index"][5] = -1
        one_state, wanted = one_step(one_state, frozen, batch)
        placed = sharding.to_global(batch, mesh) if axes else batch
        state, metrics = step(state, mesh_frozen, placed)
        for name in wanted:
            np.testing.assert_allclose(
                metrics[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=f"{name}, step {i}"
            )
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        jax.tree.leaves(one_state.params),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=jax.tree_util.keystr(path))


def test_logits_a_few_positions_at_a_time_change_nothing(monkeypatch):
    state, frozen, step = make(**OTREG)
    _, wanted = step(state, frozen, toy_batch(8))
    monkeypatch.setattr(losses.common, "LOGITS_AT_A_TIME", 2 * 24)
    make.cache_clear()
    state, frozen, step = make(**OTREG)
    after, metrics = step(state, frozen, toy_batch(8))
    for name in wanted:
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5, err_msg=name)
    make.cache_clear()


def test_what_is_frozen_or_multiplied_by_zero_stays_and_the_loss_falls():
    state, frozen, step = make(
        freeze="^llm/|positions",
        optim__learning_rate=3e-2,
        optim__multipliers=(("^encoder/", 0.0),),
        optim__warmup_steps=0,
        **OTREG,
    )
    assert not any(path.startswith("llm") for path in optim.flat_paths(state.params))
    moments = jax.tree.leaves(state.opt_state)
    assert sum(x.size for x in moments) < 2.1 * sum(x.size for x in jax.tree.leaves(state.params))
    frozen_before = jax.tree.map(np.array, frozen)
    encoder_before = jax.tree.map(np.array, state.params["encoder"])
    history = []
    for _ in range(8):
        state, metrics = step(state, frozen, toy_batch(8))
        history.append(float(metrics["loss"]))
    assert history[-1] < history[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, frozen, frozen_before)
    jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], encoder_before)


def test_the_average_of_the_weights_follows_those_of_finite_steps():
    state, frozen, step = make(optim__ema_decay=0.15, **OTREG)
    wanted, updates = jax.tree.map(np.array, state.params), 0
    for i in range(4):
        batch = toy_batch(8, seed=i)
        if i == 2:
            batch["mel"][0, 0, 0] = np.nan
        state, metrics = step(state, frozen, batch)
        if not metrics["bad_steps"]:
            decay = (0.1, 0.15, 0.15)[updates]  # 1 / 10, then 2 / 11 and 3 / 12 are above 0.15
            blend = lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new)
            wanted, updates = jax.tree.map(blend, wanted, state.params), updates + 1
    assert updates == 3
    average = optim.averaged(state.params, state.opt_state)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, average, wanted)
    plain, *_ = make(**OTREG)
    assert optim.averaged(plain.params, plain.opt_state) is plain.params


def test_a_non_finite_step_changes_nothing_and_is_counted():
    state, frozen, step = make(**OTREG)
    state, _ = step(state, frozen, toy_batch(8))
    broken = toy_batch(8)
    broken["mel"][0, 0, 0] = np.nan
    after, metrics = step(state, frozen, broken)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    assert (int(after.step), int(metrics["bad_steps"])) == (2, 1)
    after, metrics = step(after, frozen, toy_batch(8))
    assert int(metrics["bad_steps"]) == 0


def test_filler_rows_count_nowhere():
    state, frozen, step = make(**OTREG)
    batch = toy_batch(8)
    half = {key: value[:4] for key, value in batch.items()}
    filled = dict(batch, index=np.where(np.arange(8) < 4, batch["index"], -1))
    _, with_filler = step(state, frozen, filled)
    _, without = step(state, frozen, half)
    for name in ("loss", "ce", "otreg", "ctc", "grad_norm"):
        np.testing.assert_allclose(with_filler[name], without[name], rtol=1e-4, err_msg=name)


def test_no_recompilation_after_the_first_step_of_a_shape():
    state, frozen, step = make(**OTREG)
    for seed in range(3):
        state, _ = step(state, frozen, toy_batch(8, seed))
    compiled = step._cache_size()
    for seed in range(3):
        state, _ = step(state, frozen, toy_batch(8, seed))
    assert step._cache_size() == compiled


def test_two_stages_are_schedules():
    config = toy_config(
        num_steps=100,
        otreg__weight=2.0,
        otreg__start_step=40,
        otreg__ramp_steps=20,
        otreg__position_weight=3.0,
        otreg__position_weight_final=0.0,
    )
    schedules = losses.make_schedules(config)
    weights = [float(schedules.otreg_weight(jnp.int32(s))) for s in (0, 40, 50, 60, 99)]
    np.testing.assert_allclose(weights, [0, 0, 1, 2, 2])
    gammas = [float(schedules.position_weight(jnp.int32(s))) for s in (0, 40, 70, 100)]
    np.testing.assert_allclose(gammas, [3, 3, 1.5, 0])


def test_stage_one_has_the_gradient_of_cross_entropy_alone():
    state, frozen, step = make(otreg__weight=2.0, otreg__start_step=5)
    plain_state, _, plain_step = make()
    _, metrics = step(state, frozen, toy_batch(8))
    _, plain = plain_step(plain_state, frozen, toy_batch(8))
    assert float(metrics["otreg"]) > 0 and float(metrics["otreg_weight"]) == 0
    np.testing.assert_allclose(metrics["grad_norm"], plain["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)


def test_every_parameter_needs_a_sharding_rule():
    config = toy_config()
    mesh = sharding.make_mesh(config)
    with pytest.raises(ValueError, match="strange/name.*no sharding rule.*\n.*strange/other"):
        sharding.tree_shardings(
            {"strange": {"name": jnp.zeros((2, 2)), "other": jnp.zeros(3)}}, mesh
        )


def test_impossible_meshes_say_what_to_do():
    config = toy_config(batch_size=8)
    config.mesh.fsdp = 3
    with pytest.raises(ValueError, match="data=2, fsdp=3, tensor=1 needs 6 devices, 8 are there"):
        sharding.make_mesh(config)
    with pytest.raises(ValueError, match="batch_size=12 does not divide over 8.*multiple of 8"):
        sharding.make_mesh(toy_config(batch_size=12))


def ctc_head(rng):
    blank = jnp.asarray(rng.normal(size=6), jnp.float32)
    return {"blank": blank, "blank_bias": jnp.float32(0.7), "log_scale": jnp.log(3.0)}


def test_cross_entropy_and_ctc_against_the_definition(monkeypatch):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 5)).astype(np.float32)
    tokens, length = np.array([[1, 2, 3], [4, 0, 0]]), np.array([3, 1])
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    wanted = [log_p[0, 0, 1], log_p[0, 1, 2], log_p[0, 2, 3], log_p[0, 3, 0]]
    wanted += [log_p[1, 0, 4], log_p[1, 1, 0]]
    for at_a_time in (2**21, 15, 1):  # logits; of 5 tokens: all positions, 3 of them, one
        monkeypatch.setattr(losses.common, "LOGITS_AT_A_TIME", at_a_time)
        ce, accuracy = losses.cross_entropy(
            jnp.asarray(logits), lambda x: x, tokens, length, np.array([True, True]), eos=0
        )
        np.testing.assert_allclose(ce, -np.mean(wanted), rtol=1e-5)
        right = [logits[0, t].argmax() == label for t, label in enumerate([1, 2, 3, 0])]
        right += [logits[1, t].argmax() == label for t, label in enumerate([4, 0])]
        np.testing.assert_allclose(accuracy, np.mean(right), rtol=1e-6)

    # CTC of one token in two positions: blank-token, token-blank or token-token.
    speech = rng.normal(size=(2, 2, 6)).astype(np.float32)
    table = rng.normal(size=(5, 6)).astype(np.float32)
    ctc = ctc_head(rng)
    mask = np.array([[True, False, False], [True, True, True]])
    loss, infeasible = losses.ctc_loss(
        speech, np.array([2, 2]), np.array([[1, 0, 0], [1, 2, 3]]), mask, table, ctc
    )
    classes = np.concatenate([table, np.asarray(ctc["blank"])[None]])
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    p = np.exp(3 * unit(speech[0]) @ unit(classes).T + [0, 0, 0, 0, 0, 0.7])
    p /= p.sum(-1, keepdims=True)
    likelihood = p[0, 5] * p[1, 1] + p[0, 1] * p[1, 5] + p[0, 1] * p[1, 1]
    np.testing.assert_allclose(loss, -np.log(likelihood), rtol=1e-4)
    assert int(infeasible) == 1  # three tokens do not fit two positions


@pytest.mark.parametrize("speech_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
def test_ctc_a_few_positions_at_a_time_changes_nothing(monkeypatch, table_dtype, speech_dtype):
    """Equal neighbours, tokens that come back, filler, transcripts that do not fit; and the dtypes
    of a frozen or trained table and of what computes in bfloat16."""
    rng = np.random.default_rng(0)
    tokens = np.array([[1, 1, 2, 1], [3, 4, 3, 0], [0, 0, 0, 0], [5, 6, 7, 8], [2, 2, 2, 0]])
    mask = np.arange(4) < np.array([4, 3, 0, 4, 3])[:, None]
    lengths = np.array([9, 7, 8, 3, 4])  # the last ones are too short for theirs
    speech = rng.normal(size=(5, 9, 6)).astype(np.float32)
    speech[1, 7:] = np.nan
    speech = jnp.asarray(speech, speech_dtype)
    table = jnp.asarray(rng.normal(size=(10, 6)), table_dtype)
    ctc = ctc_head(rng)

    def value_and_gradient(at_a_time):
        monkeypatch.setattr(losses.common, "LOGITS_AT_A_TIME", at_a_time)
        loss = lambda speech, ctc: losses.ctc_loss(speech, lengths, tokens, mask, table, ctc)
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(speech, ctc)

    (wanted, left_out), gradient = value_and_gradient(2**21)
    assert wanted > 1 and left_out == 2 and np.all(np.isfinite(gradient[0]))
    for at_a_time in (11, 4 * 11):  # positions: one, four
        (loss, number), found = value_and_gradient(at_a_time)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        assert number == left_out
        assert found[0].dtype == speech.dtype
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            if a.shape == speech.shape and speech_dtype == "bfloat16":  # a sum, rounded otherwise
                np.testing.assert_allclose(a, b, atol=2**-7 * np.abs(b).max())
            else:
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_dropout_differs_between_steps_and_micro_batches():
    config = toy_config(adapter__dropout=0.5)
    slm, params = toy_slm(dropout=0.5)
    schedules = losses.make_schedules(config)

    @jax.jit
    def ce(batch, step):
        return losses.loss_fn(slm, params, batch, step, config=config, schedules=schedules)[1]["ce"]

    batch = toy_batch(4)
    shifted = batch | {"index": batch["index"] + 4}  # the same rows, as if another micro-batch
    assert len({float(ce(batch, 0)), float(ce(batch, 1)), float(ce(shifted, 0))}) == 3
    assert ce(batch, 0) == ce(batch, 0)
