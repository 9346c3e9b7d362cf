"""CTC of the adapter's outputs over the LLM's vocabulary."""

import jax
import jax.numpy as jnp
import optax

from otreg_jax.losses.common import pieces, positions_at_a_time, unit
from otreg_jax.models.layers import length_mask


def init_ctc(key, width: int, scale: float, classes_C=None) -> dict:
    """Parameters of the CTC head: a blank vector [D] and the log of the cosine logits' scale; with
    `classes_C`, sorted token ids that alone are classes, these too (int32: they are not trained).

    Over all 49,152 rows of a real table cosine logits of scale 10 give no class more than a few
    thousandths of the probability, so the loss has a floor near 8 nats a token and hardly moves.
    """
    params = {"blank": jax.random.normal(key, (width,)), "log_scale": jnp.log(jnp.float32(scale))}
    if classes_C is not None:
        params["classes"] = jnp.asarray(classes_C, jnp.int32)
    return params


def ctc_feasible(speech_length_B, tokens_BT, text_mask_BT, ctc_params=None) -> jax.Array:
    """bool [B]: has a transcript whose tokens are classes, and enough positions to emit it in."""
    length_B = text_mask_BT.sum(axis=1)
    if ctc_params and "classes" in ctc_params:
        classes_C = ctc_params["classes"]
        known_BT = classes_C[_class_of(tokens_BT, classes_C)] == tokens_BT
        length_B = jnp.where((known_BT | ~text_mask_BT).all(axis=1), length_B, 0)
    # CTC needs a blank between equal neighbours.
    repeats_B = jnp.sum((tokens_BT[:, 1:] == tokens_BT[:, :-1]) & text_mask_BT[:, 1:], axis=1)
    return (length_B > 0) & (length_B + repeats_B <= speech_length_B)


def ctc_loss(
    speech_BSD, speech_length_B, tokens_BT, text_mask_BT, table_VD, ctc_params, num_tokens=None
):
    """CTC (Graves et al. 2006, optax) of adapter outputs against the LLM's vocabulary.

    The logits are scaled cosines to the rows of the embedding table (which this loss does not
    train) and to a learned blank. Utterances whose transcript cannot be emitted in so few positions
    have no finite CTC loss: they are left out of the mean and counted, as are those with a token
    that is no class. With a large vocabulary the logits exist a few positions at a time, as in
    `cross_entropy`.

    Returns:
      (loss per transcript token, number of utterances left out).
    """
    speech_mask_BS = length_mask(speech_length_B, speech_BSD.shape[1])
    speech_BSD = unit(jnp.where(speech_mask_BS[..., None], speech_BSD, 0).astype(jnp.float32))
    table_VD = jax.lax.stop_gradient(table_VD)
    fits_B = ctc_feasible(speech_length_B, tokens_BT, text_mask_BT, ctc_params)
    if "classes" in ctc_params:
        tokens_BT = _class_of(tokens_BT, ctc_params["classes"])
        table_VD = table_VD[ctc_params["classes"]]
    size = positions_at_a_time(len(table_VD) + 1)
    if speech_BSD.shape[1] <= size:
        classes_VD = unit(
            jnp.concatenate([table_VD.astype(jnp.float32), ctc_params["blank"][None]])
        )
        cosine_BSV = jnp.einsum("bsd,vd->bsv", speech_BSD, classes_VD)
        logits_BSV = cosine_BSV * jnp.exp(ctc_params["log_scale"])
        labels_BT, left_out_BS = tokens_BT, 0.0
    else:
        logits_BSV, labels_BT, left_out_BS = _ctc_of_few_classes(
            speech_BSD, tokens_BT, table_VD, ctc_params, size
        )

    length_B = text_mask_BT.sum(axis=1)
    loss_B = optax.ctc_loss(
        logits_BSV, 1.0 - speech_mask_BS, labels_BT, 1.0 - text_mask_BT,
        blank_id=logits_BSV.shape[2] - 1,
    ) + jnp.sum(left_out_BS * speech_mask_BS, axis=1)  # fmt: skip
    if num_tokens is None:
        num_tokens = jnp.sum(length_B, where=fits_B)
    loss = jnp.sum(loss_B, where=fits_B) / jnp.maximum(num_tokens, 1)
    return loss, jnp.sum((length_B > 0) & ~fits_B)


def _class_of(tokens_BT, classes_C):
    """Where each token stands among the sorted classes; anywhere, if it is none of them."""
    return jnp.minimum(jnp.searchsorted(classes_C, tokens_BT), len(classes_C) - 1)


def _ctc_of_few_classes(speech_BSD, tokens_BT, table_VD, ctc_params, size: int):
    """CTC needs the probabilities of the transcript's tokens and of the blank alone; the others
    only take part in the softmax's sum, which is made from `size` positions at a time.

    Returns:
      logits [B, S, T + 1] of the tokens of a transcript and of the blank; the transcript in these
      classes [B, T]; and what the softmax over them leaves out [B, S]: the difference of the log of
      its sum to that over all classes. Each path takes one class a position, so the sum of these
      differences is what CTC over few classes lacks of CTC over all.
    """
    scale = jnp.exp(ctc_params["log_scale"])
    blank_D = unit(ctc_params["blank"])
    squares_V = jnp.sum(jnp.square(table_VD.astype(jnp.float32)), axis=-1)
    inverse_V = jax.lax.rsqrt(jnp.maximum(squares_V, 1e-12))

    @jax.checkpoint
    def log_sum(speech_BnD):  # over all classes; the table is not copied to be normalised
        dot_BnV = jnp.einsum(
            "bnd,vd->bnv", speech_BnD.astype(table_VD.dtype), table_VD,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        log_sum_Bn = jax.nn.logsumexp(dot_BnV * inverse_V * scale, axis=-1)
        return jnp.logaddexp(log_sum_Bn, speech_BnD @ blank_D * scale)

    all_BS = jnp.moveaxis(jax.lax.map(log_sum, pieces(speech_BSD, size)), 0, 1)
    all_BS = all_BS.reshape(len(speech_BSD), -1)[:, : speech_BSD.shape[1]]
    text_BTD = unit(table_VD[tokens_BT].astype(jnp.float32))
    cosine_BST = jnp.einsum("bsd,btd->bst", speech_BSD, text_BTD)
    logits_BST = jnp.concatenate([cosine_BST, (speech_BSD @ blank_D)[..., None]], axis=-1) * scale
    # Equal tokens are one class, that of the first: CTC asks for a blank between them.
    first_BT = jnp.argmax(tokens_BT[:, :, None] == tokens_BT[:, None], axis=2)
    return logits_BST, first_BT, all_BS - jax.nn.logsumexp(logits_BST, axis=-1)
