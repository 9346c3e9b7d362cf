"""Sinkhorn's iterations by ott-jax, in the log domain: the reference for the other solvers."""

import jax
import jax.numpy as jnp
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn


def solve(
    cost_BST: jax.Array, a_BS: jax.Array, b_BT: jax.Array, num_iters: int, speech_tau: float
) -> jax.Array:
    """Plans [B, S, T] float32 for costs in units of epsilon and marginals; zero mass is padding."""
    # min == max: a convergence test would put an all-reduce into the loop of a sharded batch.
    solver = sinkhorn.Sinkhorn(
        lse_mode=True,
        threshold=0.0,
        norm_error=1,
        inner_iterations=num_iters,
        min_iterations=num_iters,
        max_iterations=num_iters,
    )

    def of_example(cost_ST, a_S, b_T):
        # Without any mass logarithms would meet as inf - inf: give such an example some to move.
        empty = a_S.sum() == 0
        a_S = jnp.where(empty, jnp.zeros_like(a_S).at[0].set(1.0), a_S)
        b_T = jnp.where(empty, jnp.zeros_like(b_T).at[0].set(1.0), b_T)
        problem = linear_problem.LinearProblem(
            geometry.Geometry(cost_matrix=cost_ST, epsilon=1.0), a_S, b_T, tau_a=speech_tau
        )
        f_S, g_T = solver(problem).potentials
        return jnp.where(empty, 0.0, jnp.exp(f_S[:, None] + g_T[None] - cost_ST))

    return jax.vmap(of_example)(cost_BST, a_BS, b_BT)
