"""The transport plan: the linear program it tends to, its gradient, its sharding, and traps that
obvious implementations fall into."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from otreg_jax import otreg, sharding

S, T = 11, 6

transport_plan = jax.jit(
    otreg.transport_plan, static_argnames=["epsilon", "num_iters", "speech_tau", "backend"]
)


def random_problem(size=3, seed=0):
    cost_BST = np.random.default_rng(seed).uniform(size=(size, S, T)).astype(np.float32)
    return cost_BST, np.full((size, S), 1 / S, np.float32), np.full((size, T), 1 / T, np.float32)


def test_no_gradient_flows_through_the_plan():
    cost_BST, a_BS, b_BT = random_problem()
    for backend in otreg.BACKENDS:

        def one_entry(cost_BST, backend=backend):
            options = dict(epsilon=0.1, num_iters=3, backend=backend)
            return transport_plan(cost_BST, a_BS, b_BT, **options)[0, 0, 0]

        assert not np.any(jax.grad(one_entry)(cost_BST))


def test_plan_tends_to_the_exact_linear_program():
    cost_BST, a_BS, b_BT = random_problem()
    plan_BST = np.asarray(
        transport_plan(cost_BST, a_BS, b_BT, epsilon=1e-3, num_iters=5000), np.float64
    )
    for b in range(len(cost_BST)):
        exact_ST = ot.emd(np.full(S, 1 / S), np.full(T, 1 / T), cost_BST[b].astype(np.float64))
        assert np.abs(plan_BST[b] - exact_ST).sum() < 1e-3
        cost, exact_cost = np.sum(plan_BST[b] * cost_BST[b]), np.sum(exact_ST * cost_BST[b])
        np.testing.assert_allclose(cost, exact_cost, rtol=1e-3)


def test_relaxed_plan_is_pots_unbalanced_plan():
    """speech_tau = rho means a Kullback-Leibler price of epsilon * rho / (1 - rho)."""
    cost_BST, a_BS, b_BT = random_problem()
    plan_BST = transport_plan(cost_BST, a_BS, b_BT, epsilon=0.1, num_iters=1000, speech_tau=0.8)
    for b in range(len(cost_BST)):
        reference_ST = ot.unbalanced.sinkhorn_unbalanced(
            a_BS[b].astype(np.float64),
            b_BT[b].astype(np.float64),
            cost_BST[b].astype(np.float64),
            reg=0.1,
            reg_m=(0.1 * 0.8 / 0.2, np.inf),
            reg_type="kl",
            numItermax=5000,
            stopThr=1e-12,
        )
        assert np.abs(plan_BST[b] - reference_ST).sum() < 1e-5


def while_bodies(compiled_text):
    """The text of every computation that a while loop of the HLO module runs, nested ones too."""
    computations = {}
    for block in compiled_text.split("\n\n"):
        header = block.strip().split("\n", 1)[0].removeprefix("ENTRY ")
        computations[header.split(" ", 1)[0].lstrip("%")] = block
    names = set(computations)
    calls = {
        name: {other for other in names - {name} if f"%{other}," in block or f"%{other}\n" in block}
        for name, block in computations.items()
    }
    reached = set()
    frontier = {
        part.split("%", 1)[1].split(",")[0].split("\n")[0]
        for block in computations.values()
        for part in block.replace("condition=", "body=").split("body=")[1:]
    }
    while frontier:
        reached |= frontier
        frontier = {callee for name in frontier for callee in calls.get(name, ())} - reached
    return "\n".join(computations[name] for name in reached)


@pytest.mark.shipped
def test_sinkhorn_loop_of_a_sharded_batch_has_no_collective():
    spread = sharding.batch_sharding(sharding.data_mesh())
    problem = jax.device_put(random_problem(size=8), spread)
    ours = functools.partial(otreg.transport_plan, epsilon=0.1, num_iters=20)

    def adaptive(cost_BST, a_BS, b_BT):
        def solve(cost_ST, a_S, b_T):
            geom = geometry.Geometry(cost_matrix=cost_ST, epsilon=0.1)
            return sinkhorn.Sinkhorn()(linear_problem.LinearProblem(geom, a_S, b_T)).matrix

        return jax.vmap(solve)(cost_BST, a_BS, b_BT)

    loops = while_bodies(jax.jit(ours).lower(*problem).compile().as_text())
    assert loops and "all-reduce" not in loops and "all-gather" not in loops
    # a convergence test on the batch makes every iteration wait for every device
    assert "all-reduce" in while_bodies(jax.jit(adaptive).lower(*problem).compile().as_text())


def ott_plan(cost_ST, a_S, b_T, epsilon, **options):
    geom = geometry.Geometry(cost_matrix=cost_ST, epsilon=epsilon)
    problem = linear_problem.LinearProblem(geom, a_S, b_T)
    return sinkhorn.Sinkhorn(**options)(problem).matrix


def test_costs_at_padding_do_not_reach_the_plan():
    cost_BST, a_BS, b_BT = random_problem()
    a_BS[:, -2:], b_BT[:, -2:] = 0, 0
    a_BS, b_BT = a_BS / a_BS.sum(1, keepdims=True), b_BT / b_BT.sum(1, keepdims=True)
    far_BST = cost_BST.copy()
    far_BST[:, -2:], far_BST[:, :, -2:] = 100, 100
    options = dict(epsilon=0.05, num_iters=50)
    np.testing.assert_array_equal(
        transport_plan(cost_BST, a_BS, b_BT, **options),
        transport_plan(far_BST, a_BS, b_BT, **options),
    )
    # ott's default epsilon is relative to a statistic of all costs, padded ones included
    default = jax.jit(functools.partial(ott_plan, a_S=a_BS[0], b_T=b_BT[0], epsilon=None))
    assert np.abs(default(cost_BST[0]) - default(far_BST[0])).sum() > 0.1


def test_sharp_costs_keep_their_mass():
    cost_BST, a_BS, b_BT = random_problem()
    sharp_BST = 1 + cost_BST  # bounded away from 0, so that exp(-cost / epsilon) is 0 in float32
    plan_BST = transport_plan(sharp_BST, a_BS, b_BT, epsilon=5e-4, num_iters=50)
    # float32 carries cost / epsilon = 4000 to 2.4e-4, and so the plan's entries
    np.testing.assert_allclose(plan_BST.sum(axis=(1, 2)), 1, rtol=5e-4)
    kernel_mode = functools.partial(
        ott_plan, epsilon=5e-4, lse_mode=False, min_iterations=50, max_iterations=50
    )
    lost_ST = jax.jit(kernel_mode)(sharp_BST[0], a_BS[0], b_BT[0])
    assert not lost_ST.sum() > 0.5  # ott's kernel mode returns nothing, silently


def test_bfloat16_costs_are_solved_in_float32():
    cost_BST, a_BS, b_BT = random_problem()
    low_BST = jnp.asarray(cost_BST, jnp.bfloat16)
    plan_BST = transport_plan(low_BST, a_BS, b_BT, epsilon=0.05, num_iters=50)
    exact_BST = transport_plan(low_BST.astype(jnp.float32), a_BS, b_BT, epsilon=0.05, num_iters=50)
    assert plan_BST.dtype == jnp.float32
    np.testing.assert_allclose(plan_BST, exact_BST, atol=1e-7)


def test_transport_plan_names_an_unknown_backend():
    with pytest.raises(ValueError, match="backend='cuda' is not one of auto, xla, pallas, ott"):
        otreg.transport_plan(*random_problem(), epsilon=0.1, num_iters=5, backend="cuda")
