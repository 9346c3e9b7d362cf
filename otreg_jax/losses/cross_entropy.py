"""Cross-entropy of the transcript, whose logits need not exist all at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from otreg_jax.losses.common import sums_in_pieces


def cross_entropy(
    hidden_BTD: jax.Array,
    to_logits: Callable,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    real_B: jax.Array,
    eos: int,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy and accuracy over the transcript tokens and one end of sequence each.

    With a large vocabulary the logits are made, used and forgotten a few positions at a time, and
    made once more for the backward pass.

    Args:
      hidden_BTD: T + 1 states that predict T tokens; prediction t <= length_B counts.
      to_logits: from states [B, n, D] to float32 logits [B, n, V].
      num_tokens: what the sums are divided by, if these rows are a part of a batch.
    """
    num_predictions = hidden_BTD.shape[1]
    index_1T = jnp.arange(num_predictions)[None]
    padded_BT = jnp.pad(tokens_BT, ((0, 0), (0, 1)))
    labels_BT = jnp.where(index_1T < length_B[:, None], padded_BT, eos)
    mask_BT = (index_1T <= length_B[:, None]) & real_B[:, None]

    def sums(hidden_BnD, labels_Bn, mask_Bn):
        logits_BnV = to_logits(hidden_BnD)
        losses_Bn = optax.softmax_cross_entropy_with_integer_labels(logits_BnV, labels_Bn)
        correct_Bn = logits_BnV.argmax(axis=-1) == labels_Bn
        return jnp.sum(losses_Bn, where=mask_Bn), jnp.sum(correct_Bn, where=mask_Bn)

    vocab_size = jax.eval_shape(to_logits, hidden_BTD).shape[-1]
    loss, correct = sums_in_pieces(sums, [hidden_BTD, labels_BT, mask_BT], vocab_size)
    count = jnp.maximum(mask_BT.sum() if num_tokens is None else num_tokens, 1)
    return loss / count.astype(jnp.float32), correct / count
