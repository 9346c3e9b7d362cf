"""The method against its definition: exact padding, envelope gradient, text sets, sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ott.geometry import costs, pointcloud

from otreg_jax import otreg

B, S, T, D = 4, 11, 6, 8
SPEECH_LENGTH_B = np.array([11, 7, 5, 9])
TEXT_LENGTH_B = np.array([6, 4, 3, 1])


def make_batch(speech_length_B=SPEECH_LENGTH_B, text_length_B=TEXT_LENGTH_B, seed=0, fill=0.0):
    """(speech, text, speech mask, text mask) of sizes B, S, T, D, padding holding `fill`."""
    rng = np.random.default_rng(seed)
    size = len(speech_length_B)
    speech_BSD = rng.normal(size=(size, S, D)).astype(np.float32)
    text_BTD = rng.normal(size=(size, T, D)).astype(np.float32)
    speech_mask_BS = np.arange(S) < np.asarray(speech_length_B)[:, None]
    text_mask_BT = np.arange(T) < np.asarray(text_length_B)[:, None]
    speech_BSD[~speech_mask_BS] = fill
    text_BTD[~text_mask_BT] = fill
    return speech_BSD, text_BTD, speech_mask_BS, text_mask_BT


@functools.partial(jax.jit, static_argnames=["options"])
def compiled(batch, token_ids_BT, position_weight, num_examples, options):
    speech_BSD, *rest = batch

    def loss(speech_BSD):
        out = otreg.regularizer(
            speech_BSD,
            *rest,
            token_ids_BT=token_ids_BT,
            position_weight=position_weight,
            num_examples=num_examples,
            **dict(options),
        )
        return out.loss, out

    grad_BSD, out = jax.grad(loss, has_aux=True)(speech_BSD)
    return out, grad_BSD


def loss_and_grad(*batch, token_ids_BT=None, position_weight=0.0, num_examples=None, **options):
    """(OTReg, gradient with respect to the speech embeddings); compiled once per set of options."""
    if token_ids_BT is None:
        token_ids_BT = np.zeros(batch[3].shape, int)
    return compiled(
        batch, token_ids_BT, position_weight, num_examples, tuple(sorted(options.items()))
    )


def log_sinkhorn(cost_ST, a_S, b_T, epsilon, num_iters=3000, speech_tau=1.0):
    """Entropic plan and dual value in float64 by plain log-domain iterations."""
    cost_ST = np.asarray(cost_ST, np.float64)
    f_S, g_T = np.zeros(len(a_S)), np.zeros(len(b_T))
    for _ in range(num_iters):
        g_T = epsilon * (np.log(b_T) - np.logaddexp.reduce((f_S[:, None] - cost_ST) / epsilon, 0))
        f_S = epsilon * (np.log(a_S) - np.logaddexp.reduce((g_T - cost_ST) / epsilon, 1))
        f_S = speech_tau * f_S
    plan_ST = np.exp((f_S[:, None] + g_T - cost_ST) / epsilon)
    return plan_ST, f_S @ a_S + g_T @ b_T - epsilon * plan_ST.sum()


def cosine_cost(x_ND, y_MD):
    x_ND, y_MD = np.array(x_ND, np.float64), np.array(y_MD, np.float64)
    x_ND /= np.linalg.norm(x_ND, axis=-1, keepdims=True)
    y_MD /= np.linalg.norm(y_MD, axis=-1, keepdims=True)
    return 1 - x_ND @ y_MD.T


@pytest.mark.parametrize("fill", [1e4, np.nan])
@pytest.mark.parametrize(
    "options",
    [
        dict(position_weight=0.5),
        dict(center="mean", speech_tau=0.5),
        dict(center="pcs", text_set="unique", text_mass="count"),
    ],
    ids=str,
)
def test_content_of_padding_never_matters(options, fill):
    ids_BT = np.random.default_rng(1).integers(0, 4, (B, T))
    clean, clean_grad_BSD = loss_and_grad(*make_batch(), token_ids_BT=ids_BT, **options)
    dirty, dirty_grad_BSD = loss_and_grad(*make_batch(fill=fill), token_ids_BT=ids_BT, **options)
    assert np.isfinite(clean.loss) and clean.loss > 0
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    np.testing.assert_array_equal(clean_grad_BSD, dirty_grad_BSD)
    speech_mask_BS, text_mask_BT = make_batch()[2:]
    assert not np.any(np.asarray(clean_grad_BSD)[~speech_mask_BS])
    assert not np.any(np.asarray(clean.plan)[~speech_mask_BS])
    assert not np.any(np.asarray(clean.plan).swapaxes(1, 2)[~text_mask_BT])


@pytest.mark.parametrize("options", [dict(position_weight=0.5), dict(speech_tau=0.5)], ids=str)
def test_amount_of_padding_does_not_matter(options):
    batch = make_batch()
    wide = [np.pad(x, [(0, 0), (0, 5)] + [(0, 0)] * (x.ndim - 2)) for x in batch]
    out, grad_BSD = loss_and_grad(*batch, **options)
    wide_out, wide_grad_BSD = loss_and_grad(*wide, **options)
    np.testing.assert_allclose(wide_out.loss, out.loss, rtol=1e-6)
    np.testing.assert_allclose(wide_out.plan[:, :S, :T], out.plan, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(wide_grad_BSD[:, :S], grad_BSD, atol=1e-6)


def test_examples_without_speech_or_text_do_not_count():
    full, full_grad_BSD = loss_and_grad(*make_batch(), position_weight=0.5)
    some = make_batch([11, 0, 5, 0], [6, 4, 0, 0], fill=np.nan)  # only the first has both
    out, grad_BSD = loss_and_grad(*some, position_weight=0.5)
    np.testing.assert_array_equal(out.plan[0], full.plan[0])
    np.testing.assert_allclose(grad_BSD[0], B * full_grad_BSD[0], rtol=1e-5, atol=1e-7)
    cost_ST = cosine_cost(some[0][0], some[1][0])
    np.testing.assert_allclose(out.loss, np.sum(out.plan[0] * cost_ST), rtol=1e-5)
    np.testing.assert_allclose(
        out.metrics["nearest_cosine"], 1 - cost_ST.min(axis=1).mean(), rtol=1e-5
    )
    assert not np.any(out.plan[1:]) and not np.any(grad_BSD[1:])

    nothing, grad_BSD = loss_and_grad(
        *make_batch([0] * B, [0] * B, fill=np.nan), position_weight=0.5
    )
    assert nothing.loss == 0 and not np.any(nothing.plan) and not np.any(grad_BSD)
    assert all(value == 0 for value in nothing.metrics.values())


def test_one_token_transcript_receives_all_mass():
    batch = make_batch([11, 7, 5, 1], [1, 1, 1, 1])
    out, _ = loss_and_grad(*batch, position_weight=0.5)
    expected_BS = batch[2] / batch[2].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out.plan[:, :, 0], expected_BS, atol=1e-6)
    lengths = batch[2].sum(axis=1)
    cost = [cosine_cost(batch[0][b, :s], batch[1][b, :1]).mean() for b, s in enumerate(lengths)]
    np.testing.assert_allclose(out.loss, np.mean(cost), rtol=1e-5)


def test_bfloat16_input_loses_only_its_own_rounding():
    speech_BSD, text_BTD, *masks = make_batch()
    low = jnp.asarray(speech_BSD, jnp.bfloat16), jnp.asarray(text_BTD, jnp.bfloat16)
    out, grad_BSD = loss_and_grad(*low, *masks)
    same, same_grad_BSD = loss_and_grad(*(x.astype(jnp.float32) for x in low), *masks)
    assert out.plan.dtype == out.loss.dtype == jnp.float32 and grad_BSD.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.loss, same.loss, rtol=1e-6)
    np.testing.assert_allclose(out.plan, same.plan, atol=1e-6)
    scale = np.abs(same_grad_BSD).max()
    np.testing.assert_allclose(grad_BSD.astype(jnp.float32), same_grad_BSD, atol=2**-7 * scale)


def test_text_sets_are_equivalent_where_they_should_be():
    speech_BSD, _, speech_mask_BS, text_mask_BT = make_batch()
    rng = np.random.default_rng(2)
    table_VD = rng.normal(size=(20, D)).astype(np.float32)
    ids_BT = rng.integers(0, 3, (B, T))

    def loss(ids_BT, text_mask_BT=text_mask_BT, **options):
        batch = speech_BSD, table_VD[ids_BT], speech_mask_BS, text_mask_BT
        return loss_and_grad(*batch, token_ids_BT=ids_BT, **options)

    sequence, sequence_grad_BSD = loss(ids_BT)
    count, count_grad_BSD = loss(ids_BT, text_set="unique", text_mass="count")
    np.testing.assert_allclose(count.loss, sequence.loss, rtol=1e-5)
    np.testing.assert_allclose(count_grad_BSD, sequence_grad_BSD, atol=1e-6)

    unique, unique_grad_BSD = loss(ids_BT, text_set="unique")
    assert abs(unique.loss - sequence.loss) > 1e-3  # three ids in six tokens: another problem ...
    first_BT = text_mask_BT.copy()
    for b, t in np.ndindex(B, T):
        first_BT[b, t] &= ids_BT[b, t] not in ids_BT[b, :t]
    by_hand, by_hand_grad_BSD = loss(ids_BT, first_BT)  # ... that of the first occurrences alone
    np.testing.assert_allclose(unique.loss, by_hand.loss, rtol=1e-6)
    np.testing.assert_allclose(unique_grad_BSD, by_hand_grad_BSD, atol=1e-7)

    distinct_BT = np.tile(np.arange(T), (B, 1))
    for text_mass in "uniform", "count":
        same, _ = loss(distinct_BT, text_set="unique", text_mass=text_mass)
        np.testing.assert_allclose(same.loss, loss(distinct_BT)[0].loss, rtol=1e-6)


def test_gradient_is_that_of_the_regularized_optimal_value():
    """Envelope theorem: no derivative of the plan is needed. The value is computed in float64."""
    epsilon, gamma = 0.1, 0.5
    batch = make_batch()
    _, grad_BSD = loss_and_grad(*batch, position_weight=gamma, epsilon=epsilon, num_iters=1000)
    position_ST = np.square(np.linspace(0, 1, S)[:, None] - np.linspace(0, 1, T))
    text_TD = batch[1][0]

    def value(speech_SD):
        cost_ST = cosine_cost(speech_SD, text_TD) + gamma * position_ST
        return log_sinkhorn(cost_ST, np.full(S, 1 / S), np.full(T, 1 / T), epsilon, 1000)[1]

    speech_SD, step = batch[0][0].astype(np.float64), 1e-5
    for s, d in [(0, 0), (3, 5), (7, 2), (10, 7)]:
        bump_SD = np.zeros((S, D))
        bump_SD[s, d] = step
        difference = (value(speech_SD + bump_SD) - value(speech_SD - bump_SD)) / (2 * step)
        np.testing.assert_allclose(B * grad_BSD[0, s, d], difference, rtol=1e-4, atol=1e-6)


def test_no_gradient_flows_into_text():
    speech_BSD, text_BTD, *masks = make_batch()

    @jax.jit
    @jax.grad
    def text_gradient(text_BTD):
        return otreg.regularizer(speech_BSD, text_BTD, *masks, center="mean").loss

    assert not np.any(text_gradient(text_BTD))


def test_relaxed_speech_side_drops_outlier_frames():
    speech_BSD, text_BTD, *_ = make_batch([S] * B, [T] * B)
    nearest_BS = np.arange(S) % T
    speech_BSD = text_BTD[:, nearest_BS] + 0.1 * speech_BSD
    speech_BSD[:, -3:] = -text_BTD.sum(axis=1, keepdims=True)  # silence: like no token
    batch = speech_BSD, text_BTD, np.ones((B, S), bool), np.ones((B, T), bool)
    kept, _ = loss_and_grad(*batch, epsilon=0.1)
    relaxed, _ = loss_and_grad(*batch, epsilon=0.1, speech_tau=0.5)
    np.testing.assert_allclose(kept.plan.sum(axis=2), 1 / S, atol=1e-5)
    assert relaxed.plan.sum(axis=2)[:, -3:].max() < 0.05 / S
    assert relaxed.loss < 0.5 * kept.loss
    for b in range(B):
        cost_ST = cosine_cost(speech_BSD[b], text_BTD[b])
        reference_ST, _ = log_sinkhorn(
            cost_ST, np.full(S, 1 / S), np.full(T, 1 / T), 0.1, num_iters=50, speech_tau=0.5
        )
        assert np.abs(relaxed.plan[b] - reference_ST).sum() < 1e-5


def test_mean_centring_removes_a_common_offset():
    speech_BSD, text_BTD, speech_mask_BS, text_mask_BT = make_batch()
    offset_D = 10 * np.ones(D, np.float32)
    center = otreg.text_centering(text_BTD, text_mask_BT, "mean")
    np.testing.assert_allclose(center.mean_D, text_BTD[text_mask_BT].mean(axis=0), atol=1e-6)
    here, _ = loss_and_grad(speech_BSD, text_BTD, speech_mask_BS, text_mask_BT, center="mean")
    there, _ = loss_and_grad(
        speech_BSD + offset_D, text_BTD + offset_D, speech_mask_BS, text_mask_BT, center="mean"
    )
    np.testing.assert_allclose(there.loss, here.loss, rtol=1e-4)


def test_pcs_centring_finds_the_principal_directions_and_removes_them():
    _, text_BTD, _, text_mask_BT = make_batch()
    scale_D = np.array([9, 6, 4, 1, 1, 1, 0.5, 0.5], np.float32)
    text_BTD = text_BTD * scale_D
    center = otreg.text_centering(text_BTD, text_mask_BT, "pcs")
    valid_ND = text_BTD[text_mask_BT].astype(np.float64)
    _, _, rows_DD = np.linalg.svd(valid_ND - valid_ND.mean(axis=0))
    expected_ND = rows_DD[: otreg.NUM_DIRECTIONS]
    np.testing.assert_allclose(  # the same subspace
        center.directions_ND.T @ center.directions_ND, expected_ND.T @ expected_ND, atol=1e-3
    )

    clean_BTD = otreg.remove_common(text_BTD, text_mask_BT, center)
    assert np.abs(clean_BTD @ center.directions_ND.T).max() < 1e-4
    np.testing.assert_allclose(clean_BTD.sum(axis=(0, 1)), 0, atol=1e-4)
    assert not np.any(np.asarray(clean_BTD)[~text_mask_BT])


def test_given_centring_equals_its_own():
    @jax.jit
    def given(*batch):
        center = otreg.text_centering(batch[1], batch[3], "mean")
        return otreg.regularizer(*batch, center=center).loss

    own, _ = loss_and_grad(*make_batch(), center="mean")
    np.testing.assert_allclose(given(*make_batch()), own.loss, rtol=1e-6)


def test_position_plan_never_looks_at_the_embeddings():
    masks = make_batch()[2:]
    options = dict(plan="position", position_weight=3.0)
    first, _ = loss_and_grad(*make_batch(seed=1)[:2], *masks, **options)
    second, _ = loss_and_grad(*make_batch(seed=2)[:2], *masks, **options)
    np.testing.assert_array_equal(first.plan, second.plan)
    assert abs(first.loss - second.loss) > 1e-3
    # monotone: the mean transcript position rises with the speech position
    centre_S = first.plan[0] @ np.arange(T) / first.plan[0].sum(axis=1)
    assert np.all(np.diff(centre_S) > 0)


def test_position_cost_uses_valid_lengths():
    _, _, speech_mask_BS, text_mask_BT = make_batch()
    position_BST = otreg.position_cost(speech_mask_BS, text_mask_BT)
    for b, (s, t) in enumerate(zip(SPEECH_LENGTH_B, TEXT_LENGTH_B, strict=True)):
        expected_ST = np.square(np.linspace(0, 1, s)[:, None] - np.linspace(0, 1, t))
        np.testing.assert_allclose(position_BST[b, :s, :t], expected_ST, atol=1e-6)


def test_loss_charges_the_similarity_not_the_position():
    batch = make_batch([S] * B, [T] * B)
    out, _ = loss_and_grad(*batch, position_weight=2.0)
    cost = [np.sum(out.plan[b] * cosine_cost(batch[0][b], batch[1][b])) for b in range(B)]
    np.testing.assert_allclose(out.loss, np.mean(cost), rtol=1e-5)


def test_squared_euclidean_cost():
    speech_BSD, text_BTD, *masks = make_batch([S] * B, [T] * B)
    out, _ = loss_and_grad(speech_BSD, text_BTD, *masks, cost="sqeuclidean", epsilon=1.0)
    losses = []
    for b in range(B):
        cost_ST = np.square(speech_BSD[b][:, None] - text_BTD[b]).sum(axis=-1)
        plan_ST, _ = log_sinkhorn(cost_ST, np.full(S, 1 / S), np.full(T, 1 / T), 1.0, num_iters=50)
        assert np.abs(out.plan[b] - plan_ST).sum() < 1e-5
        losses.append(np.sum(plan_ST * cost_ST))
    np.testing.assert_allclose(out.loss, np.mean(losses), rtol=1e-5)


def test_metrics_are_what_they_say():
    batch = make_batch([S] * B, [T] * B)
    out, _ = loss_and_grad(*batch, num_iters=3)
    plan_BST = np.asarray(out.plan, np.float64)
    error_B = np.abs(plan_BST.sum(1) - 1 / T).sum(1) + np.abs(plan_BST.sum(2) - 1 / S).sum(1)
    assert error_B.mean() > 1e-3  # three iterations are not enough, and the metric must say so
    nearest_BS = [1 - cosine_cost(batch[0][b], batch[1][b]).min(axis=1) for b in range(B)]
    expected = {
        "transport_cost": out.loss,
        "marginal_error": error_B.mean(),
        "entropy": -np.sum(plan_BST * np.log(plan_BST)) / B,
        "nearest_cosine": np.mean(nearest_BS),
    }
    assert out.metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(out.metrics[name], value, rtol=1e-3, err_msg=name)


def test_num_examples_makes_pieces_add_up():
    batch = make_batch([11, 7, 0, 9], TEXT_LENGTH_B)
    whole, whole_grad_BSD = loss_and_grad(*batch)
    total, total_grad_BSD = 0, 0
    for rows in [[True, True, False, False], [False, False, True, True]]:
        piece = *batch[:2], batch[2] & np.array(rows)[:, None], batch[3]
        out, grad_BSD = loss_and_grad(*piece, num_examples=3)
        total, total_grad_BSD = total + out.loss, total_grad_BSD + grad_BSD
    np.testing.assert_allclose(total, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(total_grad_BSD, whole_grad_BSD, atol=1e-7)


# Sharding


def data_sharding():
    return NamedSharding(Mesh(np.array(jax.devices()[:8]), ("data",)), P("data"))


def test_sharded_equals_unsharded():
    batch = make_batch([11, 7, 0, 9, 3, 1, 11, 4], [6, 4, 3, 1, 2, 6, 0, 5], fill=np.nan)
    one, one_grad_BSD = loss_and_grad(*batch, center="pcs")
    eight, eight_grad_BSD = loss_and_grad(*jax.device_put(batch, data_sharding()), center="pcs")
    assert len(eight.plan.sharding.device_set) == 8
    np.testing.assert_allclose(eight.loss, one.loss, rtol=1e-5)
    np.testing.assert_allclose(eight.plan, one.plan, atol=1e-6)
    np.testing.assert_allclose(eight_grad_BSD, one_grad_BSD, atol=1e-6)


# Traps that the obvious implementations fall into


def test_zero_vectors_have_finite_gradients():
    speech_BSD, text_BTD, *masks = make_batch()
    speech_BSD[:, 0] = 0  # a valid position, not padding
    out, grad_BSD = loss_and_grad(speech_BSD, text_BTD, *masks)
    assert np.isfinite(out.loss) and np.all(np.isfinite(grad_BSD))
    assert not np.any(grad_BSD[:, 0]) and np.any(grad_BSD[:, 1])

    @jax.jit
    @jax.grad
    def with_pointcloud(speech_SD):
        geom = pointcloud.PointCloud(speech_SD, text_BTD[0], cost_fn=costs.Cosine(), epsilon=0.1)
        return jnp.sum(geom.cost_matrix)

    assert not np.all(np.isfinite(with_pointcloud(speech_BSD[0])))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(text_set="bag"), "text_set='bag' is not one of sequence, unique"),
        (dict(text_mass="sum"), "text_mass='sum'"),
        (dict(center="median"), "center='median'"),
        (dict(cost="dot"), "cost='dot'"),
        (dict(plan="dtw"), "plan='dtw'"),
        (dict(backend="cuda"), "backend='cuda' is not one of auto, xla, pallas, ott"),
        (dict(epsilon=0.0), "epsilon=0.0 must be above 0"),
        (dict(num_iters=0), "num_iters=0 must be at least 1"),
        (dict(speech_tau=0.0), "speech_tau=0.0 must be in"),
        (dict(speech_tau=1.5), "speech_tau=1.5 must be in"),
        (dict(text_set="unique"), "needs token_ids_BT"),
        (dict(plan="position"), "needs position_weight > 0"),
        (dict(cost="dot", epsilon=-1.0), "cost='dot'.*epsilon=-1.0"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        otreg.regularizer(*make_batch(), **options)
