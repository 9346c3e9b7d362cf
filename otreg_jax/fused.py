"""Structure beside points: fused Gromov-Wasserstein plans, for `otreg.regularizer` to refine to.

A plan of points compares speech with text. Structure compares what is within each: two positions
that sound alike should go to one token, or to two that are alike. That says something before speech
and text have anything in common. Vayer et al. 2020 ("Fused Gromov-Wasserstein distance for
structured objects") weigh both, C being the costs that the plan has without structure:

    P = argmin_P (1 - alpha) <P, C> + alpha E(P) - epsilon H(P)
    E(P) = sum_{s,s',t,t'} (cos(x_s, x_s') - cos(y_t, y_t'))^2 P_st P_s't'

Peyré, Cuturi & Solomon 2016 put the gradient of E at the last plan in its place and solve again. We
take one such step, from the plan without structure: two Sinkhorns in all.

Structure is the cosine of every pair of positions, not the difference of neighbours: speech has
several positions a token, so its neighbours are nearly equal where those of text never are. Cosines
within a token are about 1 on both sides however long it is, and the rate of speech does not matter.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from otreg_jax import otreg


def refinement(alpha: float, speech_tau: float = 1.0) -> Callable[..., jax.Array] | None:
    """The argument `refine` of `otreg.regularizer` for structure of weight alpha, in [0, 1); None
    if that is 0. speech_tau: the regularizer's.
    """
    return functools.partial(cost, alpha=alpha, speech_tau=speech_tau) if alpha else None


def cost(
    plan_cost_BST: jax.Array,
    plan_BST: jax.Array,
    speech_BSD: jax.Array,
    text_BTD: jax.Array,
    *,
    alpha: float,
    speech_tau: float = 1.0,
) -> jax.Array:
    """(1 - alpha) C + alpha grad E(P) [B, S, T] float32, but for what is constant along a column.

    The text marginal is fixed: such constants do not change a plan. Nor do those along a row while
    speech_tau is 1, and the cosines of speech are then never formed. With S the more numerous, two
    products with the embeddings are cheaper than those S x S, and not larger than the embeddings.

    Args:
      plan_cost_BST, plan_BST: C and P; P is 0 at padding.
      speech_BSD, text_BTD: embeddings, any float dtype, finite at padding. No gradient flows back.
    """
    product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    speech_BSD, text_BTD = jax.lax.stop_gradient((speech_BSD, text_BTD))
    within_text_BTT, _ = otreg.pairwise_cost(text_BTD, text_BTD)
    square_BSD = jnp.square(speech_BSD.astype(jnp.float32))
    scale_BS1 = otreg.inverse_root(jnp.sum(square_BSD, axis=-1, keepdims=True))
    sent_BST = scale_BS1 * product("bst,btu->bsu", plan_BST, within_text_BTT)
    sum_BTD = product("bst,bsd->btd", sent_BST, speech_BSD)
    gradient_BST = -4 * scale_BS1 * product("bsd,btd->bst", speech_BSD, sum_BTD)
    if speech_tau < 1:
        within_speech_BSS, _ = otreg.pairwise_cost(speech_BSD, speech_BSD)
        moved_BS = plan_BST.sum(axis=2)
        gradient_BST += 2 * product("bsr,br->bs", within_speech_BSS**2, moved_BS)[..., None]
    return (1 - alpha) * plan_cost_BST + alpha * gradient_BST
