"""The training loss: cross-entropy + lambda * OTReg + weight * CTC -> (loss, metrics).

Every term is a sum divided by a global count (transcript tokens for cross-entropy and CTC,
utterances for OTReg), so that the value does not depend on how many devices the batch is spread
over, nor on how many micro-batches it is cut into.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from otreg_jax import config as config_lib
from otreg_jax import otreg
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.layers import length_mask

# Logits of an utterance that exist at a time. With a large vocabulary all of them, in float32 and
# with their gradients, would be the largest arrays of the step.
LOGITS_AT_A_TIME = 2**21


class Schedules(NamedTuple):
    """The weights that move with the step: lambda of OTReg and gamma of its position prior."""

    otreg_weight: optax.Schedule
    position_weight: optax.Schedule


def make_schedules(config) -> Schedules:
    """Two stages as schedules: lambda is 0 until `otreg.start_step` (SFT), then rises over
    `otreg.ramp_steps`; gamma goes linearly from its first to its final value over stage 2."""
    c = config.otreg
    if c.ramp_steps:
        ramp = optax.linear_schedule(0.0, c.weight, c.ramp_steps, transition_begin=c.start_step)
    else:
        ramp = lambda step: jnp.where(step >= c.start_step, c.weight, 0.0)
    final = c.position_weight if c.position_weight_final < 0 else c.position_weight_final
    decay = optax.linear_schedule(
        c.position_weight, final, max(config.num_steps - c.start_step, 1), c.start_step
    )
    return Schedules(ramp, decay)


class Totals(NamedTuple):
    """What belongs to a whole batch when only a part of its rows is at hand (accumulation).

    num_tokens, num_examples, num_ctc_tokens: what the sums of cross-entropy, OTReg and CTC are
      divided by. center: what OTReg removes from its embeddings.
    """

    num_tokens: jax.Array | None = None
    num_examples: jax.Array | None = None
    num_ctc_tokens: jax.Array | None = None
    center: otreg.Centering | str | None = None


def batch_totals(slm: slm_lib.SLM, params, batch, config) -> Totals:
    """The totals of a batch; with them the losses of its micro-batches add up to its own."""
    c = config.otreg
    length_B = jnp.where(batch["index"] >= 0, batch["token_length"], 0)
    text_mask_BT = length_mask(length_B, batch["tokens"].shape[1])
    speech_length_B = slm_lib.speech_length(slm, batch["mel_length"])
    center = c.center
    if c.weight and center != "none":
        text_BTD = slm_lib.text_embeddings(slm, params, batch["tokens"], c.layer)
        center = otreg.text_centering(text_BTD, text_mask_BT, center)
    fits_B = ctc_feasible(speech_length_B, batch["tokens"], text_mask_BT)
    return Totals(
        num_tokens=count_tokens(batch),
        num_examples=jnp.sum((length_B > 0) & (speech_length_B > 0)),
        num_ctc_tokens=jnp.sum(length_B, where=fits_B),
        center=center,
    )


def count_tokens(batch) -> jax.Array:
    """What cross-entropy predicts in a batch: transcript tokens and one end of sequence each."""
    return jnp.sum(batch["token_length"] + 1, where=batch["index"] >= 0)


def loss_fn(
    slm: slm_lib.SLM, params, batch, step, *, config, schedules: Schedules,
    totals: Totals | None = None,
):  # fmt: skip
    """The loss of a batch and its metrics.

    Args:
      batch: as of the data pipeline; rows whose `index` is negative are filler and count nowhere.
      step: int32 scalar, for the schedules.
      totals: of the batch that these rows are a part of; they are a whole one without it.

    Returns:
      loss: float32 scalar. metrics: float32 scalars `loss`, `ce`, `token_accuracy`, and where the
      term is on `otreg`, `marginal_error`, `entropy`, `nearest_cosine`, `ctc`, `ctc_infeasible`,
      `infonce`; all of them sums over utterances divided by totals.
    """
    totals = totals or Totals()
    rngs = None
    if config.adapter.dropout:
        # The first row's index: micro-batches of a step draw apart, and apart from SpecAugment.
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        rngs = {"dropout": jax.random.fold_in(key, batch["index"][0])}
    out = slm_lib.forward(slm, params, batch, config.otreg.layer, rngs)
    real_B = batch["index"] >= 0
    ce, accuracy = transcript_cross_entropy(slm, params, out.hidden_BTD, batch, totals.num_tokens)
    loss = ce
    metrics = {"ce": ce, "token_accuracy": accuracy}

    text_mask_BT = length_mask(batch["token_length"], batch["tokens"].shape[1]) & real_B[:, None]
    speech_mask_BS = length_mask(out.speech_length_B, out.speech_BSD.shape[1])
    if config.otreg.weight:
        options = config_lib.otreg_options(config)
        if totals.center is not None:
            options["center"] = totals.center
        ot = otreg.regularizer(
            out.speech_BSD, out.text_BTD, speech_mask_BS, text_mask_BT,
            token_ids_BT=batch["tokens"], position_weight=schedules.position_weight(step),
            num_examples=totals.num_examples, **options,
        )  # fmt: skip
        loss = loss + schedules.otreg_weight(step) * ot.loss
        metrics |= {"otreg": ot.loss}
        metrics |= {key: ot.metrics[key] for key in ("marginal_error", "entropy", "nearest_cosine")}
    if config.ctc.weight:
        ctc, infeasible = ctc_loss(
            out.adapted_BSD, out.speech_length_B, batch["tokens"], text_mask_BT,
            params["llm"]["embed"]["embedding"], params["ctc"], totals.num_ctc_tokens,
        )  # fmt: skip
        loss = loss + config.ctc.weight * ctc
        metrics |= {"ctc": ctc, "ctc_infeasible": infeasible}
    if config.infonce.weight:
        infonce = infonce_loss(
            out.speech_BSD, speech_mask_BS, out.text_BTD, text_mask_BT, config.infonce.temperature
        )
        loss = loss + config.infonce.weight * infonce
        metrics["infonce"] = infonce
    metrics = {"loss": loss, **metrics}
    return loss, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)


def transcript_cross_entropy(slm: slm_lib.SLM, params, hidden_BTD, batch, num_tokens=None):
    """`cross_entropy` of the states of `slm_lib.forward` over a batch of the data pipeline."""
    return cross_entropy(
        hidden_BTD, functools.partial(slm_lib.logits, slm, params), batch["tokens"],
        batch["token_length"], batch["index"] >= 0, slm.prompt.eos, num_tokens,
    )  # fmt: skip


def cross_entropy(
    hidden_BTD: jax.Array, to_logits: Callable, tokens_BT: jax.Array, length_B: jax.Array,
    real_B: jax.Array, eos: int, num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Mean cross-entropy and accuracy over the transcript tokens and one end of sequence each.

    With a large vocabulary the logits are made, used and forgotten a few positions at a time, and
    made once more for the backward pass.

    Args:
      hidden_BTD: T + 1 states that predict T tokens; prediction t <= length_B counts.
      to_logits: from states [B, n, D] to float32 logits [B, n, V].
      num_tokens: what the sums are divided by, if these rows are a part of a batch.
    """
    num_predictions = hidden_BTD.shape[1]
    index_T = jnp.arange(num_predictions)
    padded_BT = jnp.pad(tokens_BT, ((0, 0), (0, 1)))
    labels_BT = jnp.where(index_T < length_B[:, None], padded_BT, eos)
    mask_BT = (index_T <= length_B[:, None]) & real_B[:, None]

    def sums(hidden_BnD, labels_Bn, mask_Bn):
        logits_BnV = to_logits(hidden_BnD)
        losses_Bn = optax.softmax_cross_entropy_with_integer_labels(logits_BnV, labels_Bn)
        correct_Bn = logits_BnV.argmax(axis=-1) == labels_Bn
        return jnp.sum(losses_Bn, where=mask_Bn), jnp.sum(correct_Bn, where=mask_Bn)

    vocab_size = jax.eval_shape(to_logits, hidden_BTD).shape[-1]
    size = max(LOGITS_AT_A_TIME // vocab_size, 1)
    if num_predictions <= size:
        loss, correct = sums(hidden_BTD, labels_BT, mask_BT)
    else:

        def add(carry, piece):
            return jax.tree.map(jnp.add, carry, jax.checkpoint(sums)(*piece)), None

        zero = jnp.float32(0), jnp.int32(0)
        arrays = [_pieces(x, size) for x in (hidden_BTD, labels_BT, mask_BT)]  # added: masked out
        (loss, correct), _ = jax.lax.scan(add, zero, arrays)
    count = jnp.maximum(mask_BT.sum() if num_tokens is None else num_tokens, 1)
    return loss / count, correct / count


def _pieces(x_BT, size: int):
    """[B, T, ...] -> [pieces, B, size, ...], zeros added at the end."""
    x_BT = jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % size)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(x_BT.reshape(len(x_BT), -1, size, *x_BT.shape[2:]), 1, 0)


def init_ctc(key, width: int, scale: float) -> dict:
    """Parameters of the CTC head: a blank vector [D] and the log of the cosine logits' scale."""
    return {"blank": jax.random.normal(key, (width,)), "log_scale": jnp.log(jnp.float32(scale))}


def ctc_feasible(speech_length_B, tokens_BT, text_mask_BT) -> jax.Array:
    """bool [B]: has a transcript, and enough positions to emit it in."""
    length_B = text_mask_BT.sum(axis=1)
    # CTC needs a blank between equal neighbours.
    repeats_B = jnp.sum((tokens_BT[:, 1:] == tokens_BT[:, :-1]) & text_mask_BT[:, 1:], axis=1)
    return (length_B > 0) & (length_B + repeats_B <= speech_length_B)


def ctc_loss(
    speech_BSD, speech_length_B, tokens_BT, text_mask_BT, table_VD, ctc_params, num_tokens=None
):
    """CTC (Graves et al. 2006, optax) of adapter outputs against the LLM's vocabulary.

    The logits are scaled cosines to the rows of the embedding table (which this loss does not
    train) and to a learned blank. Utterances whose transcript cannot be emitted in so few positions
    have no finite CTC loss: they are left out of the mean and counted. With a large vocabulary the
    logits exist a few positions at a time, as in `cross_entropy`.

    Returns:
      (loss per transcript token, number of utterances left out).
    """
    speech_mask_BS = length_mask(speech_length_B, speech_BSD.shape[1])
    speech_BSD = _unit(jnp.where(speech_mask_BS[..., None], speech_BSD, 0).astype(jnp.float32))
    table_VD = jax.lax.stop_gradient(table_VD)
    size = max(LOGITS_AT_A_TIME // (len(table_VD) + 1), 1)
    if speech_BSD.shape[1] <= size:
        classes_VD = _unit(
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
    fits_B = ctc_feasible(speech_length_B, tokens_BT, text_mask_BT)
    loss_B = optax.ctc_loss(
        logits_BSV, 1.0 - speech_mask_BS, labels_BT, 1.0 - text_mask_BT,
        blank_id=logits_BSV.shape[2] - 1,
    ) + jnp.sum(left_out_BS * speech_mask_BS, axis=1)  # fmt: skip
    if num_tokens is None:
        num_tokens = jnp.sum(length_B, where=fits_B)
    loss = jnp.sum(loss_B, where=fits_B) / jnp.maximum(num_tokens, 1)
    return loss, jnp.sum((length_B > 0) & ~fits_B)


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
    blank_D = _unit(ctc_params["blank"])
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

    all_BS = jnp.moveaxis(jax.lax.map(log_sum, _pieces(speech_BSD, size)), 0, 1)
    all_BS = all_BS.reshape(len(speech_BSD), -1)[:, : speech_BSD.shape[1]]
    text_BTD = _unit(table_VD[tokens_BT].astype(jnp.float32))
    cosine_BST = jnp.einsum("bsd,btd->bst", speech_BSD, text_BTD)
    logits_BST = jnp.concatenate([cosine_BST, (speech_BSD @ blank_D)[..., None]], axis=-1) * scale
    # Equal tokens are one class, that of the first: CTC asks for a blank between them.
    first_BT = jnp.argmax(tokens_BT[:, :, None] == tokens_BT[:, None], axis=2)
    return logits_BST, first_BT, all_BS - jax.nn.logsumexp(logits_BST, axis=-1)


def _unit(x):
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def infonce_loss(speech_BSD, speech_mask_BS, text_BTD, text_mask_BT, temperature: float):
    """InfoNCE (van den Oord et al. 2018), symmetric as in CLIP: the mean speech embedding of an
    utterance should be closest to the mean embedding of its own transcript among the batch's, and
    the other way round. A rival of OTReg that knows no alignment within the utterance.

    Returns:
      loss per utterance that has a transcript; no gradient flows into the text.
    """

    def pooled(x_BND, mask_BN):
        masked_BND = jnp.where(mask_BN[..., None], x_BND, 0).astype(jnp.float32)
        return _unit(jnp.sum(masked_BND, axis=1))

    text_BD = jax.lax.stop_gradient(pooled(text_BTD, text_mask_BT))
    similarity_BB = pooled(speech_BSD, speech_mask_BS) @ text_BD.T / temperature
    valid_B = text_mask_BT.any(axis=1)
    loss = 0.0
    for logits_BB in (similarity_BB, similarity_BB.T):
        log_p_BB = jax.nn.log_softmax(jnp.where(valid_B[None], logits_BB, -1e9), axis=1)
        loss -= 0.5 * jnp.sum(jnp.diagonal(log_p_BB), where=valid_B)
    return loss / jnp.maximum(valid_B.sum(), 1)
