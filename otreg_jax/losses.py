"""The training loss: cross-entropy + lambda * OTReg + weight * CTC -> (loss, metrics).

Every term is a sum divided by a global count (transcript tokens for cross-entropy, utterances for
OTReg and CTC), so that the value does not depend on how many devices the batch is spread over.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from otreg_jax import config as config_lib
from otreg_jax import otreg
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.layers import length_mask


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


def loss_fn(slm: slm_lib.SLM, params, batch, step, *, config, schedules: Schedules):
    """The loss of a batch and its metrics.

    Args:
      batch: as of the data pipeline; rows whose `index` is negative are filler and count nowhere.
      step: int32 scalar, for the schedules.

    Returns:
      loss: float32 scalar. metrics: float32 scalars `loss`, `ce`, `token_accuracy`, and where the
      term is on `otreg`, `otreg_weight`, `position_weight`, `marginal_error`, `entropy`,
      `nearest_cosine`, `ctc`.
    """
    out = slm_lib.forward(slm, params, batch, config.otreg.layer)
    real_B = batch["index"] >= 0
    ce, accuracy = cross_entropy(
        out.logits_BTV, batch["tokens"], batch["token_length"], real_B, slm.prompt.eos
    )
    loss = ce
    metrics = {"ce": ce, "token_accuracy": accuracy}

    text_mask_BT = length_mask(batch["token_length"], batch["tokens"].shape[1]) & real_B[:, None]
    if config.otreg.weight:
        weight, gamma = schedules.otreg_weight(step), schedules.position_weight(step)
        speech_mask_BS = length_mask(out.speech_length_B, out.speech_BSD.shape[1])
        ot = otreg.regularizer(
            out.speech_BSD, out.text_BTD, speech_mask_BS, text_mask_BT,
            token_ids_BT=batch["tokens"], position_weight=gamma, **config_lib.otreg_options(config),
        )  # fmt: skip
        loss = loss + weight * ot.loss
        metrics |= {"otreg": ot.loss, "otreg_weight": weight, "position_weight": gamma}
        metrics |= {key: ot.metrics[key] for key in ("marginal_error", "entropy", "nearest_cosine")}
    if config.ctc.weight:
        ctc, infeasible = ctc_loss(
            out.adapted_BSD, out.speech_length_B, batch["tokens"], text_mask_BT,
            params["llm"]["embed"]["embedding"], params["ctc"],
        )  # fmt: skip
        loss = loss + config.ctc.weight * ctc
        metrics |= {"ctc": ctc, "ctc_infeasible": infeasible}
    metrics = {"loss": loss, **metrics}
    return loss, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)


def cross_entropy(logits_BTV, tokens_BT, length_B, real_B, eos: int):
    """Mean cross-entropy and accuracy over the transcript tokens and one end of sequence each.

    logits_BTV has T + 1 predictions for T tokens; prediction t <= length_B counts.
    """
    num_predictions = logits_BTV.shape[1]
    index_T = jnp.arange(num_predictions)
    padded_BT = jnp.pad(tokens_BT, ((0, 0), (0, 1)))
    labels_BT = jnp.where(index_T < length_B[:, None], padded_BT, eos)
    mask_BT = (index_T <= length_B[:, None]) & real_B[:, None]
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, labels_BT)
    count = jnp.maximum(mask_BT.sum(), 1)
    correct_BT = logits_BTV.argmax(axis=-1) == labels_BT
    mean = lambda x: jnp.sum(x, where=mask_BT) / count
    return mean(losses_BT), mean(correct_BT.astype(jnp.float32))


def init_ctc(key, width: int, scale: float) -> dict:
    """Parameters of the CTC head: a blank vector [D] and the log of the cosine logits' scale."""
    return {"blank": jax.random.normal(key, (width,)), "log_scale": jnp.log(jnp.float32(scale))}


def ctc_loss(speech_BSD, speech_length_B, tokens_BT, text_mask_BT, table_VD, ctc_params):
    """CTC (Graves et al. 2006, optax) of adapter outputs against the LLM's vocabulary.

    The logits are scaled cosines to the rows of the embedding table (which this loss does not
    train) and to a learned blank. Utterances whose transcript cannot be emitted in so few positions
    have no finite CTC loss: they are left out of the mean and counted.

    Returns:
      (loss per transcript token, number of utterances left out).
    """
    speech_mask_BS = length_mask(speech_length_B, speech_BSD.shape[1])
    square = lambda x: jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(square(x), 1e-12))
    speech_BSD = unit(jnp.where(speech_mask_BS[..., None], speech_BSD, 0).astype(jnp.float32))
    table_VD = jax.lax.stop_gradient(table_VD).astype(jnp.float32)
    classes_VD = unit(jnp.concatenate([table_VD, ctc_params["blank"][None]]))
    cosine_BSV = jnp.einsum("bsd,vd->bsv", speech_BSD, classes_VD)
    logits_BSV = cosine_BSV * jnp.exp(ctc_params["log_scale"])

    length_B = text_mask_BT.sum(axis=1)
    # CTC needs a blank between equal neighbours.
    repeats_B = jnp.sum((tokens_BT[:, 1:] == tokens_BT[:, :-1]) & text_mask_BT[:, 1:], axis=1)
    fits_B = (length_B > 0) & (length_B + repeats_B <= speech_length_B)
    loss_B = optax.ctc_loss(
        logits_BSV, 1.0 - speech_mask_BS, tokens_BT, 1.0 - text_mask_BT,
        blank_id=classes_VD.shape[0] - 1,
    )  # fmt: skip
    num_tokens = jnp.maximum(jnp.sum(length_B, where=fits_B), 1)
    return jnp.sum(loss_B, where=fits_B) / num_tokens, jnp.sum((length_B > 0) & ~fits_B)
