"""The training loss: cross-entropy + lambda * OTReg + weight * CTC + ... -> (loss, metrics).

Cross-entropy asks for the answer (the transcript, if that is the task); OTReg and CTC take the
transcript whatever the answer is, and leave out a row without one. Every term is a sum divided by a
global count (tokens for cross-entropy, KL and CTC, utterances for OTReg), so that the value does
not depend on how many devices the batch is spread over, nor on how many micro-batches it is cut
into.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from otreg_jax import config as config_lib
from otreg_jax import fused, otreg, priors, sharding
from otreg_jax.losses.cross_entropy import cross_entropy
from otreg_jax.losses.ctc import ctc_collapse, ctc_feasible, ctc_loss, ctc_reading
from otreg_jax.losses.infonce import infonce_loss
from otreg_jax.losses.reading import reading_kl
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.layers import length_mask


class Schedules(NamedTuple):
    """The weights that move with the step: lambda of OTReg and gamma of its position prior."""

    otreg_weight: optax.Schedule
    position_weight: optax.Schedule


def make_schedules(config, start: int = 0) -> Schedules:
    """The paper's two stages as schedules: lambda is 0 until `otreg.start_step` (SFT), then rises
    over `otreg.ramp_steps`; gamma goes linearly from its first to its final value from there on.

    start: the step that counts as 0, where the configuration is that of a stage.
    """
    c = config.otreg
    if c.ramp_steps:
        ramp = optax.linear_schedule(0.0, c.weight, c.ramp_steps, transition_begin=c.start_step)
    else:
        ramp = lambda step: jnp.where(step >= c.start_step, c.weight, 0.0)
    final = c.position_weight if c.position_weight_final < 0 else c.position_weight_final
    decay = optax.linear_schedule(
        c.position_weight, final, max(config.num_steps - c.start_step, 1), c.start_step
    )
    return Schedules(*(lambda step, f=f: f(step - start) for f in (ramp, decay)))


class Totals(NamedTuple):
    """What belongs to a whole batch when only a part of its rows is at hand (accumulation).

    num_tokens, num_read_tokens, num_examples, num_ctc_tokens: what the sums of cross-entropy, KL,
      OTReg and CTC are divided by. center: what OTReg removes from its embeddings, by layer.
    """

    num_tokens: jax.Array | None = None
    num_read_tokens: jax.Array | None = None
    num_examples: jax.Array | None = None
    num_ctc_tokens: jax.Array | None = None
    center: dict[int, otreg.Centering] | None = None


def batch_totals(slm: slm_lib.SLM, params, batch, config) -> Totals:
    """The totals of a batch; with them the losses of its micro-batches add up to its own."""
    c = config.otreg
    tokens_BT, length_B = slm_lib.transcript_of(batch)
    length_B = jnp.where(batch["index"] >= 0, length_B, 0)
    text_mask_BT = length_mask(length_B, tokens_BT.shape[1])
    speech_length_B = slm_lib.speech_length(slm, batch["mel_length"])
    center = None
    if c.weight and c.center != "none":
        embedded = lambda layer: slm_lib.text_embeddings(slm, params, tokens_BT, layer)
        center = {
            layer: otreg.text_centering(embedded(layer), text_mask_BT, c.center)
            for layer in config_lib.target_layers(config)
        }
    fits_B = ctc_feasible(speech_length_B, tokens_BT, text_mask_BT, params.get("ctc"))
    return Totals(
        num_tokens=count_tokens(batch),
        num_read_tokens=jnp.sum(batch["token_length"] + 1, where=can_be_read(batch)),
        num_examples=jnp.sum((length_B > 0) & (speech_length_B > 0)),
        num_ctc_tokens=jnp.sum(length_B, where=fits_B),
        center=center,
    )


def count_tokens(batch) -> jax.Array:
    """What cross-entropy predicts in a batch: tokens of answers and one end of sequence each."""
    return jnp.sum(batch["token_length"] + 1, where=batch["index"] >= 0)


def can_be_read(batch) -> jax.Array:
    """bool [B]: rows that the LLM can read in the place of hearing them, fillers left out."""
    real_B = batch["index"] >= 0
    return real_B & (batch["transcript_length"] > 0) if "transcript" in batch else real_B


def loss_fn(
    slm: slm_lib.SLM,
    params,
    batch,
    step,
    *,
    config,
    schedules: Schedules,
    totals: Totals | None = None,
):
    """The loss of a batch and its metrics.

    Args:
      batch: as of the data pipeline; rows whose `index` is negative are filler and count nowhere.
      step: int32 scalar, for the schedules.
      totals: of the batch that these rows are a part of; they are a whole one without it.

    Returns:
      loss: float32 scalar. metrics: float32 scalars `loss`, and where the term is on `ce`,
      `token_accuracy`, `otreg`, `marginal_error`, `entropy`, `nearest_cosine`, `ctc`,
      `ctc_infeasible`, `infonce`, `kl`; all of them sums over utterances divided by totals.
    """
    totals = totals or Totals()
    rngs = None
    if config.adapter.dropout:
        # The first row's index: micro-batches of a step draw apart, and apart from SpecAugment.
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        rngs = {"dropout": jax.random.fold_in(key, batch["index"][0])}
    predict = config.ce.weight > 0 or config.kl.weight > 0
    layer = config.otreg.layer if config.otreg.weight or config.infonce.weight else 0
    targets = config_lib.target_layers(config) if config.otreg.weight else {}
    out = slm_lib.forward(slm, params, batch, layer, rngs, predict, tuple(targets))
    real_B = batch["index"] >= 0
    loss, metrics = jnp.float32(0), {}
    if config.ce.weight:
        ce, accuracy = transcript_cross_entropy(
            slm, params, out.hidden_BTD, batch, totals.num_tokens
        )
        loss = config.ce.weight * ce
        metrics |= {"ce": ce, "token_accuracy": accuracy}
    if config.kl.weight:
        read_BTD, teacher = slm_lib.read(slm, params, batch)
        kl = reading_kl(
            out.hidden_BTD,
            read_BTD,
            functools.partial(slm_lib.logits, slm, params),
            functools.partial(slm_lib.logits, slm, teacher),
            batch["token_length"],
            can_be_read(batch),
            totals.num_read_tokens,
        )
        loss = loss + config.kl.weight * kl
        metrics["kl"] = kl

    tokens_BT, length_B = slm_lib.transcript_of(batch)
    text_mask_BT = length_mask(length_B, tokens_BT.shape[1]) & real_B[:, None]
    speech_mask_BS = length_mask(out.speech_length_B, out.speech_BSD.shape[1])
    if config.otreg.weight:
        gamma = schedules.position_weight(step)
        found = otreg_metrics(slm, params, batch, out, text_mask_BT, gamma, config, totals)
        loss = loss + schedules.otreg_weight(step) * found["otreg"]
        metrics |= found
    if config.ctc.weight:
        ctc, infeasible = ctc_loss(
            out.adapted_BSD,
            out.speech_length_B,
            tokens_BT,
            text_mask_BT,
            params["llm"]["embed"]["embedding"],
            params["ctc"],
            totals.num_ctc_tokens,
        )
        loss = loss + config.ctc.weight * ctc
        metrics |= {"ctc": ctc, "ctc_infeasible": infeasible}
    if config.infonce.weight:
        infonce = infonce_loss(
            out.speech_BSD,
            speech_mask_BS,
            out.text_BTD,
            text_mask_BT,
            config.infonce.temperature,
            otreg.text_centering(out.text_BTD, text_mask_BT, config.otreg.center),
        )
        loss = loss + config.infonce.weight * infonce
        metrics["infonce"] = infonce
    metrics = {"loss": loss, **metrics}
    return loss, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)


def otreg_metrics(slm: slm_lib.SLM, params, batch, out, text_mask_BT, gamma, config, totals):
    """{"otreg": the loss, "marginal_error", "entropy", "nearest_cosine"}, each summed over
    `config_lib.target_layers` times their shares; out: of `slm_lib.forward`, gamma: now."""
    c, options = config.otreg, config_lib.otreg_options(config)
    speech_mask_BS = length_mask(out.speech_length_B, out.adapted_BSD.shape[1])
    heard = None
    if c.after_ctc:
        table_VD = params["llm"]["embed"]["embedding"]
        heard = ctc_reading(out.adapted_BSD, speech_mask_BS, table_VD, params["ctc"])
    found = {"otreg": 0.0, "marginal_error": 0.0, "entropy": 0.0, "nearest_cosine": 0.0}
    for layer, share in config_lib.target_layers(config).items():
        (speech_BSD, text_BTD), mask_BS, mass_BS = out.compared[layer], speech_mask_BS, None
        if heard:
            speech_BSD, mask_BS, mass_BS = ctc_collapse(speech_BSD, mask_BS, *heard)
            mask_BS = otreg.gives_mass(mass_BS, mask_BS)
        if totals.center is not None:
            options["center"] = totals.center[layer]
        # What structure leaves of the other costs still has to keep a window shut.
        epsilon = c.epsilon / (1 - c.structure)
        prior = priors.arguments(c.position, gamma, c.window, epsilon, mask_BS, text_mask_BT)
        ot = otreg.regularizer(
            speech_BSD,
            text_BTD,
            mask_BS,
            text_mask_BT,
            token_ids_BT=slm_lib.transcript_of(batch)[0],
            speech_mass_BS=mass_BS,
            num_examples=totals.num_examples,
            refine=fused.refinement(c.structure, c.speech_tau),
            batch_sharding=None if slm.mesh is None else sharding.batch_sharding(slm.mesh),
            **prior,
            **options,
        )
        values = ot.metrics | {"otreg": ot.loss}
        found = {key: total + share * values[key] for key, total in found.items()}
    return found


def transcript_cross_entropy(slm: slm_lib.SLM, params, hidden_BTD, batch, num_tokens=None):
    """`cross_entropy` of the states of `slm_lib.forward` over a batch of the data pipeline."""
    return cross_entropy(
        hidden_BTD,
        functools.partial(slm_lib.logits, slm, params),
        batch["tokens"],
        batch["token_length"],
        batch["index"] >= 0,
        slm.prompt.eos,
        num_tokens,
    )
