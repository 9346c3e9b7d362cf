"""Forms of OTReg beside the plain one, each against a plain reference in float64."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from jax.test_util import check_grads
from test_otreg import cosine_cost, log_sinkhorn
from toy import toy_batch, toy_config, toy_slm

from otreg_jax import fused, losses, otreg, priors
from otreg_jax.models import slm as slm_lib

S, T, D = 11, 6, 8
SPEECH_LENGTH_B, TEXT_LENGTH_B = np.array([11, 8]), np.array([6, 4])
EPSILON = 0.1


def make_batch(seed=0, fill=np.nan):
    rng = np.random.default_rng(seed)
    speech_BSD = rng.normal(size=(2, S, D)).astype(np.float32)
    text_BTD = rng.normal(size=(2, T, D)).astype(np.float32)
    speech_mask_BS = np.arange(S) < SPEECH_LENGTH_B[:, None]
    text_mask_BT = np.arange(T) < TEXT_LENGTH_B[:, None]
    speech_BSD[~speech_mask_BS], text_BTD[~text_mask_BT] = fill, fill
    return speech_BSD, text_BTD, speech_mask_BS, text_mask_BT


@jax.jit
def solve(batch, mass_BS, prior):
    def loss(speech_BSD):
        out = otreg.regularizer(
            speech_BSD,
            *batch[1:],
            speech_mass_BS=mass_BS,
            epsilon=EPSILON,
            num_iters=500,
            prior_BST=prior,
        )
        return out.loss, out

    gradient_BSD, out = jax.grad(loss, has_aux=True)(batch[0])
    return out, gradient_BSD


def order_preserving(cost_ST, kind, weight):
    """The plan of Su & Hua 2017 as their algorithm has it: a kernel q_st exp((lambda_1 m_st - c_st)
    / epsilon) scaled in turn to the marginals, q the Gaussian and m the inverse difference."""
    num_s, num_t = cost_ST.shape
    r_ST = np.arange(num_s)[:, None] / (num_s - 1) - np.arange(num_t) / (num_t - 1)
    q_ST, moment_ST = np.ones_like(r_ST), np.zeros_like(r_ST)
    if kind == "gaussian":
        sigma = np.sqrt(EPSILON / weight)
        away_ST = np.abs(r_ST) / np.sqrt(1 / num_s**2 + 1 / num_t**2)
        q_ST = np.exp(-(away_ST**2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
    elif kind == "inverse":
        moment_ST = weight / (r_ST**2 + 1)
    kernel_ST = q_ST * np.exp((moment_ST - cost_ST) / EPSILON)
    u_S = np.ones(num_s)
    for _ in range(500):
        v_T = (1 / num_t) / (kernel_ST.T @ u_S)
        u_S = (1 / num_s) / (kernel_ST @ v_T)
    return u_S[:, None] * kernel_ST * v_T


@pytest.mark.parametrize("kind, weight", [("gaussian", 0.05), ("inverse", 1.5)])
def test_order_preserving_priors_give_the_plans_of_their_paper(kind, weight):
    batch = make_batch()
    prior = priors.arguments(kind, weight, 1.0, EPSILON, *batch[2:])["prior_BST"]
    out, gradient_BSD = solve(batch, None, prior)
    for b, (s, t) in enumerate(zip(SPEECH_LENGTH_B, TEXT_LENGTH_B, strict=True)):
        cost_ST = cosine_cost(batch[0][b, :s], batch[1][b, :t])
        wanted_ST = order_preserving(cost_ST, kind, weight)
        assert np.abs(out.plan[b, :s, :t] - wanted_ST).sum() < 1e-4
    assert not np.any(out.plan[1, 8:]) and not np.any(gradient_BSD[1, 8:])
    plain, _ = solve(batch, None, jnp.zeros_like(prior))
    assert np.abs(out.plan - plain.plan).sum() > 0.1


def test_gradient_with_a_prior_and_masses_is_that_of_the_regularized_value():
    """Envelope theorem, the value in float64: the prior and the masses are constants of it."""
    batch = make_batch()
    mass_BS = np.linspace(0.2, 1, S, dtype=np.float32)[None].repeat(2, axis=0)
    prior = priors.arguments("gaussian", 0.05, 1.0, EPSILON, *batch[2:])["prior_BST"]
    out, gradient_BSD = solve(batch, mass_BS, prior)
    a_S = mass_BS[0] / mass_BS[0].sum()
    np.testing.assert_allclose(out.plan[0].sum(axis=1), a_S, atol=1e-5)

    def value(speech_SD):
        cost_ST = cosine_cost(speech_SD, batch[1][0]) + np.asarray(prior[0], np.float64)
        return log_sinkhorn(cost_ST, a_S, np.full(T, 1 / T), EPSILON, 500)[1]

    step = 1e-4
    for s, d in [(0, 0), (7, 2), (10, 7)]:
        bump_SD = np.zeros((S, D))
        bump_SD[s, d] = step
        speech_SD = batch[0][0].astype(np.float64)
        difference = (value(speech_SD + bump_SD) - value(speech_SD - bump_SD)) / (2 * step)
        np.testing.assert_allclose(2 * gradient_BSD[0, s, d], difference, rtol=1e-3, atol=1e-6)


def test_nothing_goes_outside_a_window_and_all_goes_somewhere():
    batch = make_batch()
    for window in (0.33, 1e-3):  # the second is too narrow for any plan, and widened
        prior = priors.arguments("square", 0.0, window, EPSILON, *batch[2:])["prior_BST"]
        out, _ = solve(batch, None, prior)
        for b, (s, t) in enumerate(zip(SPEECH_LENGTH_B, TEXT_LENGTH_B, strict=True)):
            r_ST = np.abs(np.linspace(0, 1, s)[:, None] - np.linspace(0, 1, t))
            plan_ST, width = out.plan[b, :s, :t], max(window, 1 / s + 1 / t)
            assert not np.any(plan_ST[r_ST > width + 1e-6]) and np.any(r_ST > width)
            kept_ST = np.where(r_ST > width, np.inf, cosine_cost(batch[0][b, :s], batch[1][b, :t]))
            wanted_ST, _ = log_sinkhorn(
                kept_ST, np.full(s, 1 / s), np.full(t, 1 / t), EPSILON, num_iters=500
            )
            assert np.abs(plan_ST - wanted_ST).sum() < 1e-3
    assert priors.arguments("square", 2.0, 1.0, EPSILON, *batch[2:]) == {"position_weight": 2.0}


@functools.partial(jax.jit, static_argnames=("alpha", "speech_tau"))
def fuse(batch, alpha, speech_tau):
    refine = fused.refinement(alpha, speech_tau)
    options = dict(epsilon=EPSILON, num_iters=500, speech_tau=speech_tau, refine=refine)
    loss = lambda speech_BSD: otreg.regularizer(speech_BSD, *batch[1:], **options).loss
    return otreg.regularizer(*batch, **options), jax.grad(loss)(batch[0])


def row_alone(batch, b):
    """[(speech, text, masks) of row b without its padding], each a batch of one."""
    s, t = SPEECH_LENGTH_B[b], TEXT_LENGTH_B[b]
    return [x[b : b + 1, :length] for x, length in zip(batch, (s, t, s, t), strict=True)]


def test_structure_gives_the_plan_of_pots_fused_gromov_wasserstein():
    batch = make_batch()
    out, gradient_BSD = fuse(batch, 0.6, 1.0)
    for b, (s, t) in enumerate(zip(SPEECH_LENGTH_B, TEXT_LENGTH_B, strict=True)):
        speech_SD, text_TD = batch[0][b, :s], batch[1][b, :t]
        cost_ST, a_S, b_T = cosine_cost(speech_SD, text_TD), np.full(s, 1 / s), np.full(t, 1 / t)
        points_ST, _ = log_sinkhorn(cost_ST, a_S, b_T, EPSILON, 500)
        wanted_ST = ot.gromov.entropic_fused_gromov_wasserstein(
            cost_ST,
            cosine_cost(speech_SD, speech_SD),
            cosine_cost(text_TD, text_TD),
            a_S,
            b_T,
            epsilon=EPSILON,
            alpha=0.6,
            G0=points_ST,
            max_iter=1,
        )
        assert np.abs(out.plan[b, :s, :t] - wanted_ST).sum() < 1e-4
        assert np.abs(wanted_ST - points_ST).sum() > 0.1
    assert not np.any(out.plan[1, 8:]) and not np.any(gradient_BSD[1, 8:])
    alone, alone_BSD = fuse(row_alone(batch, 1), 0.6, 1.0)
    np.testing.assert_allclose(out.plan[1:, :8, :4], alone.plan, atol=1e-6)
    np.testing.assert_allclose(2 * gradient_BSD[1:, :8], alone_BSD, atol=1e-6)
    assert fused.refinement(0.0) is None


def test_structure_finds_words_that_sound_unlike_their_text():
    """Speech in a space of its own but for a cosine of 0.15; words of uneven length that recur. By
    points and position 61 % of the mass goes to the right words, with structure 68 %."""
    rng = np.random.default_rng(0)
    size, num_s, num_t, width = 16, 64, 16, 128
    turn_DD = np.linalg.qr(rng.normal(size=(width, width)))[0]
    ids_BT = rng.integers(0, 12, (size, num_t))
    text_BTD = rng.normal(size=(12, width)).astype(np.float32)[ids_BT]
    longer_BS = [rng.integers(0, num_t, num_s - num_t) for _ in range(size)]
    said_BS = np.sort([np.r_[np.arange(num_t), longer_S] for longer_S in longer_BS])
    said_BSD = np.take_along_axis(text_BTD, said_BS[..., None], axis=1)
    noise_BSD = rng.normal(size=said_BSD.shape)
    speech_BSD = (0.15 * said_BSD + 0.7 * said_BSD @ turn_DD + 0.7 * noise_BSD).astype(np.float32)
    masks = np.ones((size, num_s), bool), np.ones((size, num_t), bool)
    right_BST = np.take_along_axis(ids_BT, said_BS, axis=1)[..., None] == ids_BT[:, None]

    @jax.jit
    def mass_on_the_right_words(*batch):
        plan = lambda refine: otreg.regularizer(*batch, position_weight=3.0, refine=refine).plan
        return [jnp.sum(plan(fused.refinement(x)) * right_BST) / size for x in (0.0, 0.5)]

    points, structure = mass_on_the_right_words(speech_BSD, text_BTD, *masks)
    assert 0.4 < points < structure - 0.04


def test_structure_of_a_relaxed_plan_is_linearised_as_it_is_defined():
    batch = row_alone(make_batch(), 1)
    out, _ = fuse(batch, 0.6, 0.8)
    speech_SD, text_TD = batch[0][0], batch[1][0]
    cost_ST = cosine_cost(speech_SD, text_TD)
    a_S, b_T = np.full(8, 1 / 8), np.full(4, 1 / 4)
    plan_ST, _ = log_sinkhorn(cost_ST, a_S, b_T, EPSILON, 500, speech_tau=0.8)
    within_SS, within_TT = cosine_cost(speech_SD, speech_SD), cosine_cost(text_TD, text_TD)
    difference_SSTT = within_SS[:, :, None, None] - within_TT
    structure_ST = 2 * np.einsum("srtu,ru->st", difference_SSTT**2, plan_ST)
    fused_ST = 0.4 * cost_ST + 0.6 * structure_ST
    wanted_ST, _ = log_sinkhorn(fused_ST, a_S, b_T, EPSILON, 500, speech_tau=0.8)
    assert np.abs(out.plan[0] - wanted_ST).sum() < 1e-4
    assert np.abs(wanted_ST - plan_ST).sum() > 0.1 and np.ptp(wanted_ST.sum(axis=1)) > 0.01


def test_positions_of_next_to_no_mass_take_no_part():
    speech_BSD, text_BTD, speech_mask_BS, text_mask_BT = make_batch()
    mass_BS = np.where(np.arange(S) % 3 == 1, 0.001, 1.0) * np.ones((2, 1), np.float32)
    out, gradient_BSD = solve(make_batch(), mass_BS, jnp.zeros((2, S, T)))
    kept_BS = speech_mask_BS & (mass_BS > 0.5)
    alone, alone_BSD = solve(
        (speech_BSD, text_BTD, kept_BS, text_mask_BT), None, jnp.zeros((2, S, T))
    )
    np.testing.assert_allclose(out.plan, alone.plan, atol=1e-7)
    np.testing.assert_allclose(gradient_BSD, alone_BSD, atol=1e-7)
    assert not np.any(out.plan[:, 1::3])


def collapse_by_hand(speech_SD, class_S, heard_S):
    """[(mean vector, mean probability)] of the runs of equal classes, blanks (-1) apart."""
    runs = []
    for s, one in enumerate(class_S):
        if not (s and one == class_S[s - 1] and one >= 0):
            runs.append([])
        runs[-1].append(s)
    return [(speech_SD[rows].mean(axis=0), heard_S[rows].mean()) for rows in runs]


def test_collapse_merges_repeats_and_leaves_blanks_apart():
    speech_BSD, _, mask_BS, _ = make_batch()
    rng = np.random.default_rng(3)
    class_BS = rng.integers(-1, 2, (2, S))
    heard_BS = np.where(class_BS < 0, 0.004, 0.9).astype(np.float32)
    merged_BSD, kept_BS, mass_BS = jax.jit(losses.ctc_collapse)(
        speech_BSD, mask_BS, class_BS, heard_BS
    )
    for b, length in enumerate(SPEECH_LENGTH_B):
        rows = slice(length)
        wanted = collapse_by_hand(speech_BSD[b, rows], class_BS[b, rows], heard_BS[b, rows])
        assert kept_BS[b].tolist() == [i < len(wanted) for i in range(S)] and len(wanted) < length
        for i, (vector_D, heard) in enumerate(wanted):
            np.testing.assert_allclose(merged_BSD[b, i], vector_D, atol=1e-6)
            np.testing.assert_allclose(mass_BS[b, i], heard, atol=1e-6)
    finite_BSD = np.where(mask_BS[..., None], speech_BSD, 0)
    loss = lambda x: jnp.sum(jnp.sin(losses.ctc_collapse(x, mask_BS, class_BS, heard_BS)[0]))
    check_grads(loss, (finite_BSD,), order=1, modes=["rev"], rtol=1e-2)


@pytest.mark.parametrize("at_a_time", [2**21, 3 * 25])
def test_ctc_hears_what_its_logits_say(at_a_time, monkeypatch):
    monkeypatch.setattr(losses.common, "LOGITS_AT_A_TIME", at_a_time)
    speech_BSD, _, mask_BS, _ = make_batch()
    rng = np.random.default_rng(4)
    table_VD, blank_D = rng.normal(size=(24, D)), rng.normal(size=D)
    used = np.array([3, 5, 8, 21])
    params = {"blank": blank_D, "log_scale": np.log(4.0), "classes": used, "blank_bias": 0.3}
    class_BS, heard_BS = jax.jit(lambda *args: losses.ctc_reading(*args))(
        speech_BSD, mask_BS, table_VD, params
    )
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    logits_SV = 4 * unit(speech_BSD[0]) @ unit(np.vstack([table_VD[used], blank_D])).T
    logits_SV[:, 4] += 0.3
    p_SV = np.exp(logits_SV) / np.exp(logits_SV).sum(axis=1, keepdims=True)
    wanted_S = np.where(p_SV.argmax(axis=1) == 4, -1, p_SV.argmax(axis=1))
    np.testing.assert_array_equal(class_BS[0], wanted_S)
    np.testing.assert_allclose(heard_BS[0], 1 - p_SV[:, 4], atol=1e-5)


def test_kl_is_between_the_llm_that_reads_and_the_llm_that_hears():
    slm, params = toy_slm()
    batch = toy_batch()
    batch["index"][2] = -1
    config = toy_config(kl__weight=2.0, ce__weight=0.0)
    ends_B = 2 * batch["token_length"] + len(slm.prompt.prefix) + len(slm.prompt.suffix)
    read_BL = np.zeros((4, ends_B.max()), np.int32)
    for b, length in enumerate(batch["token_length"]):  # a transcript, and it once more
        tokens = batch["tokens"][b, :length]
        row = np.concatenate([slm.prompt.prefix, tokens, slm.prompt.suffix, tokens])
        read_BL[b, : len(row)] = row

    @jax.jit
    def compute(params):
        loss = lambda p: losses.loss_fn(
            slm, p, batch, 0, config=config, schedules=losses.make_schedules(config)
        )
        hidden_BTD = slm_lib.forward(slm, params, batch).hidden_BTD
        given_BTV = jax.nn.log_softmax(slm_lib.logits(slm, params, hidden_BTD))
        wanted_BLV = jax.nn.log_softmax(slm.llm.apply({"params": params["llm"]}, read_BL))
        return jax.value_and_grad(loss, has_aux=True)(params), given_BTV, wanted_BLV

    ((loss, metrics), gradient), given_BTV, wanted_BLV = jax.device_get(compute(params))
    total, count = 0.0, 0
    for b, length in enumerate(batch["token_length"]):
        if batch["index"][b] >= 0:
            wanted_TV = wanted_BLV[b, ends_B[b] - length - 1 : ends_B[b]]
            total += np.sum(np.exp(wanted_TV) * (wanted_TV - given_BTV[b, : length + 1]))
            count += length + 1
    np.testing.assert_allclose(metrics["kl"], total / count, rtol=1e-4)
    np.testing.assert_allclose(loss, 2 * total / count, rtol=1e-4)
    assert "ce" not in metrics and total / count > 0.01
    assert np.any(jax.tree.leaves(gradient["adapter"])[0])


def test_all_forms_at_once_have_finite_gradients(monkeypatch):
    structured = mock.Mock(wraps=fused.cost)
    monkeypatch.setattr(fused, "cost", structured)
    slm, params = toy_slm(ctc=True)
    batch = toy_batch()
    config = toy_config(
        otreg__weight=1.0,
        ctc__weight=1.0,
        otreg__position_weight=1.0,
        otreg__after_ctc=True,
        otreg__position="gaussian",
        otreg__window=0.5,
        otreg__structure=0.5,
        ce__weight=0.0,
    )
    loss = lambda p: losses.loss_fn(
        slm, p, batch, 0, config=config, schedules=losses.make_schedules(config)
    )
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.isfinite(value) and metrics["otreg"] > 0
    assert structured.call_args.kwargs == {"alpha": 0.5, "speech_tau": 1.0}
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
    assert np.any(jax.tree.leaves(gradient["adapter"])[0])


def test_targets_at_several_layers_add_up_with_their_weights():
    slm, params = toy_slm()
    batch = toy_batch()
    each = dict(otreg__weight=2.0, otreg__center="mean", otreg__text_set="sequence")
    changes = {
        "0": dict(otreg__layer=0),
        "1": dict(otreg__layer=1),
        "both": dict(otreg__layer_weights=(0.25, 0.5)),
        "both, and cross-entropy": dict(otreg__layer_weights=(0.25, 0.5), ce__weight=1.0),
    }

    @jax.jit
    def compute(params):
        found = {}
        for name, change in changes.items():
            config = toy_config(**{"ce__weight": 0.0} | each | change)
            totals = losses.batch_totals(slm, params, batch, config)
            schedules = losses.make_schedules(config)
            found[name] = losses.loss_fn(
                slm, params, batch, 0, config=config, schedules=schedules, totals=totals
            )
        return found

    found = jax.device_get(compute(params))
    of = lambda name, key="otreg": float(found[name][1][key])
    wanted = 0.25 * of("0") + 0.5 * of("1")
    np.testing.assert_allclose(of("both"), wanted, rtol=1e-5)
    np.testing.assert_allclose(of("both, and cross-entropy"), wanted, rtol=1e-5)
    np.testing.assert_allclose(found["both"][0], 2 * wanted, rtol=1e-5)
    assert abs(of("0") - of("1")) > 1e-3
