"""Costs that draw plans to the diagonal, for `otreg.regularizer` to add to the plan's costs.

With r = s/(S-1) - t/(T-1), S and T the numbers of positions that take part (Su & Hua 2017,
"Order-preserving Wasserstein distance for sequence matching"):

    square      gamma * r^2                                  what `otreg` has itself
    gaussian    gamma * r^2 / (2 (1/S^2 + 1/T^2))            distance in steps of the grid
    inverse     gamma * (1 - 1 / (r^2 + 1))                  levels off far from the diagonal

With gamma = epsilon / sigma^2, "gaussian" gives the plan that minimizes <P, C> + epsilon * KL(P|Q),
Q a Gaussian band of width sigma about the diagonal. "inverse" is their inverse difference moment,
whose weight lambda_1 is gamma. A window (Sakoe & Chiba 1978) is hard: what lies outside carries
nothing.
"""

import jax
import jax.numpy as jnp

from otreg_jax import otreg

KINDS = ("square", "gaussian", "inverse")
OUTSIDE = 1000.0  # epsilons that a pair outside the window costs: exp(-1000) is 0 in float32


def arguments(
    kind: str,
    weight: float | jax.Array,
    window: float,
    epsilon: float,
    speech_mask_BS: jax.Array,
    text_mask_BT: jax.Array,
) -> dict:
    """The arguments of `otreg.regularizer` for a prior of this kind and weight gamma (which may be
    traced) and a window: pairs with |r| <= window, 1 being no window.

    The window is never narrower than 1/S + 1/T, within which plans of equal masses exist. Where
    the masses leave no plan within it, what has to goes outside.
    """
    if kind == "square" and window == 1:
        return {"position_weight": weight}
    square_BST = otreg.position_cost(speech_mask_BS, text_mask_BT)
    step = lambda mask_BN: 1 / jnp.maximum(mask_BN.sum(axis=1), 1)[:, None, None]
    speech_step_B11, text_step_B11 = step(speech_mask_BS), step(text_mask_BT)
    prior_BST = weight * square_BST
    if kind == "gaussian":
        prior_BST /= 2 * (speech_step_B11**2 + text_step_B11**2)
    elif kind == "inverse":
        prior_BST = weight * (1 - 1 / (square_BST + 1))
    if window < 1:
        width_B11 = jnp.maximum(window, speech_step_B11 + text_step_B11)
        prior_BST += jnp.where(square_BST > width_B11**2, OUTSIDE * epsilon, 0.0)
    return {"prior_BST": prior_BST}
