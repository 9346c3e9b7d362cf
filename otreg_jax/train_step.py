"""One training step: pure, jitted over a mesh, no I/O. `pmap` is the same step on one mesh axis."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from otreg_jax import losses, optim, sharding
from otreg_jax.data import augment, features
from otreg_jax.models import encoders
from otreg_jax.models import slm as slm_lib


class TrainState(NamedTuple):
    """What training changes, and what a checkpoint holds."""

    step: jax.Array  # int32: steps done
    params: Any  # trainable parameters, float32
    opt_state: Any
    bad_steps: jax.Array  # int32: non-finite steps in a row, up to now


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before step 0; `params` are the trainable ones."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


def abstract_state(params, optimizer: optax.GradientTransformation, mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state over `params`, nothing computed."""
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        state,
        sharding.tree_shardings(state, mesh),
    )


def make_step(
    slm,
    config,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    start: int = 0,
    train: str = "",
):
    """`train_step` jitted, a function of (state, frozen, batch); the state it is given is donated,
    and its successor has the shardings of `state` (arrays or ShapeDtypeStructs).

    config, start, train: of a `stages.Stage`, or the configuration of a run without stages.
    """
    step = functools.partial(
        train_step,
        slm=slm,
        config=config,
        optimizer=optimizer,
        schedules=losses.make_schedules(config, start),
        train=train,
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_restart(optimizer: optax.GradientTransformation, state: TrainState):
    """A jitted function from the state that one stage leaves to that which the next starts from:
    the optimizer's state afresh. The state it is given is donated."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    restart = lambda state: state._replace(opt_state=optimizer.init(state.params))
    return jax.jit(restart, donate_argnums=0, out_shardings=shardings)


def make_eval_step(slm):
    """`eval_step` jitted, a function of (params, frozen, batch)."""
    return jax.jit(functools.partial(eval_step, slm=slm))


def prepare(batch, step, config, frontend: features.Frontend):
    """Frames of a batch that comes as audio (`data.features="step"`), and SpecAugment."""
    if "audio" in batch:
        mel, length = features.frames_jnp(frontend, batch["audio"], batch["audio_length"])
        batch = batch | {"mel": mel, "mel_length": length}
    masks = config.data.augment
    if masks.time_masks or masks.freq_masks:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        mel = augment.spec_augment(key, batch["mel"], batch["mel_length"], masks)
        batch = batch | {"mel": mel}
    return batch


def train_step(
    state: TrainState, frozen, batch, *, slm, config, optimizer, schedules, train: str = ""
):
    """Loss, gradient, update.

    Args:
      state: the trainable part. frozen: all other parameters; they get no gradient and have no
        optimizer state. batch: a global batch of the data pipeline. train: regex of the parameters
      that get a gradient; the optimizer was made with it too. "": all of the state's.

    Returns:
      (state, metrics). A step whose loss or gradient is not finite changes no parameter and no
      optimizer state; it still counts as a step, `metrics["bad_steps"]` says how many there were in
      a row.
    """
    batch = prepare(batch, state.step, config, encoders.frontend(slm.encoder.config))
    frozen = sharding.gather_vocabulary(frozen, slm.mesh)
    trained, resting = optim.matching(state.params, train)

    def gradient_of(rows, totals=None):
        def loss_of(trained):
            params = optim.merge(optim.merge(trained, resting), frozen)
            return losses.loss_fn(
                slm, params, rows, state.step, config=config, schedules=schedules, totals=totals
            )

        return jax.grad(loss_of, has_aux=True)(trained)

    if config.accumulation == 1:
        gradient, metrics = gradient_of(batch)
    else:
        totals = losses.batch_totals(slm, optim.merge(state.params, frozen), batch, config)
        gradient_of = functools.partial(gradient_of, totals=totals)
        gradient, metrics = sum_over_micro_batches(gradient_of, batch, config.accumulation)
    gradient = optim.merge(gradient, jax.tree.map(jnp.zeros_like, resting))
    grad_norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jnp.where(finite, new, old)
    new_state = TrainState(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
    )
    metrics |= {"grad_norm": grad_norm, "bad_steps": new_state.bad_steps}
    if config.otreg.weight:
        metrics["otreg_weight"] = schedules.otreg_weight(state.step)
        metrics["position_weight"] = schedules.position_weight(state.step)
    return new_state, metrics


def sum_over_micro_batches(fn, batch, count: int):
    """The sum of fn(micro-batch) over `count` of them, one after the other. Row i is in micro-batch
    i modulo `count`: that way each of them is spread over all devices as the batch is."""
    cut = lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None)
    return jax.lax.scan(add, zero, parts)[0]


def eval_step(params, frozen, batch, *, slm):
    """(cross-entropy summed over the transcript tokens of a batch, their number); no filler counts.

    Args:
      params, frozen: all parameters of the model. batch: of mel features, without SpecAugment.
    """
    params = optim.merge(params, frozen)
    hidden_BTD = slm_lib.forward(slm, params, batch).hidden_BTD
    num_tokens = losses.count_tokens(batch)
    ce, _ = losses.transcript_cross_entropy(slm, params, hidden_BTD, batch, num_tokens)
    return ce * num_tokens, num_tokens.astype(jnp.float32)
