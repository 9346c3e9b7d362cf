"""Distillation from the LLM that reads the transcript into the LLM that hears it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from otreg_jax.losses.common import sums_in_pieces


def reading_kl(
    hidden_BTD: jax.Array,
    read_BTD: jax.Array,
    to_logits: Callable,
    to_read_logits: Callable,
    length_B: jax.Array,
    real_B: jax.Array,
    num_tokens: jax.Array | None = None,
) -> jax.Array:
    """Mean KL(reading | hearing) of next-token distributions, in nats a prediction.

    As in DiVA (Held et al. 2024, arXiv 2410.02678) the teacher is the LLM itself with the
    transcript's text in the place of the speech, and the full distributions are compared, at the
    predictions of the transcript and its end. No gradient flows into the teacher.

    Args:
      hidden_BTD: T + 1 states that predict, as for `cross_entropy`. read_BTD: the teacher's.
      to_logits, to_read_logits: from states [B, n, D] to float32 logits [B, n, V].
      length_B, real_B: transcript tokens; False for filler rows.
      num_tokens: what the sum is divided by, if these rows are a part of a batch.
    """
    index_1T = jnp.arange(hidden_BTD.shape[1])[None]
    mask_BT = (index_1T <= length_B[:, None]) & real_B[:, None]

    def sums(hidden_BnD, read_BnD, mask_Bn):
        wanted_BnV = jax.nn.log_softmax(jax.lax.stop_gradient(to_read_logits(read_BnD)))
        given_BnV = jax.nn.log_softmax(to_logits(hidden_BnD))
        kl_Bn = jnp.sum(jnp.exp(wanted_BnV) * (wanted_BnV - given_BnV), axis=-1)
        return jnp.sum(kl_Bn, where=mask_Bn)

    vocab_size = jax.eval_shape(to_logits, hidden_BTD).shape[-1]
    kl = sums_in_pieces(sums, [hidden_BTD, jax.lax.stop_gradient(read_BTD), mask_BT], vocab_size)
    count = jnp.maximum(mask_BT.sum() if num_tokens is None else num_tokens, 1)
    return kl / count.astype(jnp.float32)
