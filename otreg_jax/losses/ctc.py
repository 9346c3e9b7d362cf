"""CTC of the adapter's outputs over the LLM's vocabulary."""

import jax
import jax.numpy as jnp
import optax

from otreg_jax.losses.common import inverse_norm, pieces, positions_at_a_time, unit
from otreg_jax.models.layers import length_mask


def init_ctc(key, width: int, scale: float, vocab_size: int, classes_C=None) -> dict:
    """Parameters of the CTC head: a blank vector [D], what its logit has beside the cosine, and the
    log of the scale of cosine logits; with `classes_C`, sorted token ids that alone are classes,
    these too (int32: they are not trained).

    The blank begins as probable as all tokens together. Were it one class of thousands, nothing
    would pay as much at first as turning all outputs towards it, and what they said of the speech
    would be lost: on Whisper base and SmolLM2-135M one seed of five did not recover in 800 steps.

    Over all 49,152 rows of a table as anisotropic as published ones, even perfect outputs leave 6
    nats a token at scale 10 (`tests/test_stages.py`): that is what `classes_C` is for.
    """
    params = {"blank": jax.random.normal(key, (width,)), "log_scale": jnp.log(jnp.float32(scale))}
    count = vocab_size if classes_C is None else len(classes_C)
    params["blank_bias"] = jnp.log(jnp.float32(count))
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
    speech_BSD = jnp.where(speech_mask_BS[..., None], speech_BSD, 0)
    table_VD = jax.lax.stop_gradient(table_VD)
    fits_B = ctc_feasible(speech_length_B, tokens_BT, text_mask_BT, ctc_params)
    if "classes" in ctc_params:
        tokens_BT = _class_of(tokens_BT, ctc_params["classes"])
        table_VD = table_VD[ctc_params["classes"]]
    scale_BS, blank_BS = _scale_and_blank(speech_BSD, ctc_params)
    size = positions_at_a_time(len(table_VD) + 1)
    if speech_BSD.shape[1] <= size:
        logits_BSV = _of_table(speech_BSD, scale_BS, table_VD, inverse_norm(table_VD))
        logits_BSV = jnp.concatenate([logits_BSV, blank_BS[..., None]], axis=-1)
        labels_BT, left_out_BS = tokens_BT, jnp.zeros_like(scale_BS)
    else:
        logits_BSV, labels_BT, left_out_BS = _ctc_of_few_classes(
            speech_BSD, scale_BS, blank_BS, tokens_BT, table_VD, size
        )

    length_B = text_mask_BT.sum(axis=1)
    is_padding = lambda mask: (~mask).astype(jnp.float32)
    loss_B = optax.ctc_loss(
        logits_BSV,
        is_padding(speech_mask_BS),
        labels_BT,
        is_padding(text_mask_BT),
        blank_id=logits_BSV.shape[2] - 1,
    )
    loss_B += jnp.sum(left_out_BS, axis=1, where=speech_mask_BS)
    if num_tokens is None:
        num_tokens = jnp.sum(length_B, where=fits_B)
    loss = jnp.sum(loss_B, where=fits_B) / jnp.maximum(num_tokens, 1).astype(jnp.float32)
    return loss, jnp.sum((length_B > 0) & ~fits_B)


def ctc_reading(speech_BSD, speech_mask_BS, table_VD, ctc_params) -> tuple[jax.Array, jax.Array]:
    """What CTC hears: at each position the most probable class, int32 [B, S], the blank being -1,
    and the probability that it is not the blank, float32 [B, S]. No gradient flows."""
    speech_BSD, table_VD, ctc_params = jax.lax.stop_gradient((speech_BSD, table_VD, ctc_params))
    speech_BSD = jnp.where(speech_mask_BS[..., None], speech_BSD, 0)
    if "classes" in ctc_params:
        table_VD = table_VD[ctc_params["classes"]]
    scale_BS, blank_BS = _scale_and_blank(speech_BSD, ctc_params)
    norm_V = inverse_norm(table_VD)

    def read(piece):
        speech_BnD, scale_Bn, blank_Bn = piece
        logits_BnV = _of_table(speech_BnD, scale_Bn, table_VD, norm_V)
        heard_Bn = jax.nn.sigmoid(jax.nn.logsumexp(logits_BnV, axis=-1) - blank_Bn)
        is_blank_Bn = blank_Bn >= logits_BnV.max(axis=-1)
        return jnp.where(is_blank_Bn, -1, logits_BnV.argmax(axis=-1)), heard_Bn

    size = min(positions_at_a_time(len(table_VD) + 1), speech_BSD.shape[1])
    cut = [pieces(x, size) for x in (speech_BSD, scale_BS, blank_BS)]
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(len(x[0]), -1)[:, : speech_BSD.shape[1]]
    return jax.tree.map(join, jax.lax.map(read, cut))


def ctc_collapse(speech_BSD, speech_mask_BS, class_BS, heard_BS):
    """Speech as CTC's collapse leaves it, for a plan between what remains and the transcript.

    Neighbours of one class (`ctc_reading`) become one position, their mean, as the collapse of
    Graves et al. 2006 merges repeats; blanks stay apart. So as long as CTC hears blanks alone,
    nothing is merged. Positions keep their order and their number, S; the last ones are then empty.

    Returns:
      speech [B, S, D] float32, mask [B, S], and the mass of each position, its probability of not
      being a blank: that of a blank is next to none.
    """
    both_BS = speech_mask_BS[:, 1:] & speech_mask_BS[:, :-1]
    repeats_BS = both_BS & (class_BS[:, 1:] == class_BS[:, :-1]) & (class_BS[:, 1:] >= 0)
    segment_BS = jnp.cumsum(jnp.pad(~repeats_BS, ((0, 0), (1, 0))), axis=1)
    total = jax.vmap(lambda x, segment: jax.ops.segment_sum(x, segment, len(segment)))
    count_BS = total(speech_mask_BS.astype(jnp.float32), segment_BS)
    speech_BSD = jnp.where(speech_mask_BS[..., None], speech_BSD, 0).astype(jnp.float32)
    mass_BS = total(jnp.where(speech_mask_BS, heard_BS, 0.0), segment_BS)
    each_BS = 1 / jnp.maximum(count_BS, 1)
    return total(speech_BSD, segment_BS) * each_BS[..., None], count_BS > 0, mass_BS * each_BS


def _scale_and_blank(speech_BSD, ctc_params):
    """What makes products with rows of unit length logits, and the blank's logit: [B, S] each."""
    scale_BS = jnp.exp(ctc_params["log_scale"]) * inverse_norm(speech_BSD)
    cosine_BS = _dot("bsd,d->bs", speech_BSD, unit(ctc_params["blank"]))
    return scale_BS, cosine_BS * scale_BS + ctc_params["blank_bias"]


def _class_of(tokens_BT, classes_C):
    """Where each token stands among the sorted classes; anywhere, if it is none of them."""
    return jnp.minimum(jnp.searchsorted(classes_C, tokens_BT), len(classes_C) - 1)


def _ctc_of_few_classes(speech_BSD, scale_BS, blank_BS, tokens_BT, table_VD, size: int):
    """CTC needs the probabilities of the transcript's tokens and of the blank alone; the others
    only take part in the softmax's sum, which is made from `size` positions at a time.

    Returns:
      logits [B, S, T + 1] of the tokens of a transcript and of the blank; the transcript in these
      classes [B, T]; and what the softmax over them leaves out [B, S]: the difference of the log of
      its sum to that over all classes. Each path takes one class a position, so the sum of these
      differences is what CTC over few classes lacks of CTC over all.
    """
    norm_V = inverse_norm(table_VD)

    @jax.checkpoint
    def log_sum(piece):  # over all classes
        speech_BnD, scale_Bn, blank_Bn = piece
        logits_BnV = _of_table(speech_BnD, scale_Bn, table_VD, norm_V)
        return jnp.logaddexp(jax.nn.logsumexp(logits_BnV, axis=-1), blank_Bn)

    cut = [pieces(x, size) for x in (speech_BSD, scale_BS, blank_BS)]
    all_BS = jnp.moveaxis(jax.lax.map(log_sum, cut), 0, 1)
    all_BS = all_BS.reshape(len(speech_BSD), -1)[:, : speech_BSD.shape[1]]
    text_BTD, norm_BT = table_VD[tokens_BT], norm_V[tokens_BT]
    logits_BST = jax.vmap(_logits)(speech_BSD, scale_BS, text_BTD, norm_BT)
    logits_BST = jnp.concatenate([logits_BST, blank_BS[..., None]], axis=-1)
    # Equal tokens are one class, that of the first: CTC asks for a blank between them.
    first_BT = jnp.argmax(tokens_BT[:, :, None] == tokens_BT[:, None], axis=2)
    return logits_BST, first_BT, all_BS - jax.nn.logsumexp(logits_BST, axis=-1)


def _logits(speech_SD, scale_S, class_VD, norm_V):
    """Float32 logits [S, V]: products, scaled by inverse norms afterwards. Neither side is rounded,
    and a table in bfloat16 is copied neither to be normalised nor to be widened."""
    return _dot("sd,vd->sv", speech_SD, class_VD) * scale_S[:, None] * norm_V[None]


_of_table = jax.vmap(_logits, in_axes=(0, 0, None, None))  # one table for all examples


def _dot(equation: str, x, y):
    dtype = x.dtype if x.dtype == y.dtype else jnp.float32
    return jnp.einsum(
        equation, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
    )
