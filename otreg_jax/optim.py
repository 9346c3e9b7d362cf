"""AdamW on the trainable parameters; everything that depends on a parameter's path is a regex."""

import re

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from otreg_jax import stages

# What weight decay pulls towards zero: matrices that multiply activations. Scales of norms have a
# level of their own to keep, and biases too, stacked over the layers as they are; rows of embedding
# tables would shrink in every step in which their token does not occur.
DECAYED = r"(^|/)(kernel|lora_a|lora_b)$"


def flat_paths(params) -> dict[str, jax.Array]:
    """{"llm/embed/embedding": array, ...}"""
    return traverse_util.flatten_dict(params, sep="/")


def split(params, frozen_regex: str):
    """(trainable, frozen): nested dicts that together are `params`; "" freezes nothing but
    integers, which have no gradient."""

    def is_frozen(path, x):
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return not is_float or bool(frozen_regex and re.search(frozen_regex, path))

    flat = flat_paths(params)
    part = lambda wanted: traverse_util.unflatten_dict(
        {path: x for path, x in flat.items() if is_frozen(path, x) == wanted}, sep="/"
    )
    return part(False), part(True)


def matching(params, regex: str):
    """(those whose path matches, the others), nested dicts that together are `params`; "" matches
    everything."""
    others, matched = split(params, regex or ".")
    return matched, others


def merge(trainable, frozen):
    """The inverse of `split`."""
    return traverse_util.unflatten_dict(flat_paths(trainable) | flat_paths(frozen), sep="/")


def learning_rate(config) -> optax.Schedule:
    """Linear warm-up, then a cosine to `final_fraction` of the peak; twice with `restart_step`."""
    c = config.optim

    def cycle(num_steps):
        return optax.warmup_cosine_decay_schedule(
            0.0 if c.warmup_steps else c.learning_rate,
            c.learning_rate,
            c.warmup_steps,
            max(num_steps, c.warmup_steps + 1),
            c.learning_rate * c.final_fraction,
        )

    second = cycle(config.num_steps - c.restart_step)
    if not c.restart_step:
        return second
    return optax.join_schedules([cycle(c.restart_step), second], [c.restart_step])


def learning_rates(plan: tuple[stages.Stage, ...]):
    """A function of a step of a run of these stages: its learning rate."""
    rates = {stage.name: learning_rate(stage.config) for stage in plan}

    def rate(step: int):
        stage = stages.at(plan, step)
        return rates[stage.name](step - stage.start)

    return rate


def make_optimizer(config, train: str = "") -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with decay of `DECAYED` alone; `optim.multipliers`, a
    tuple of (regex, factor), scales the update of parameters whose path matches (first match wins);
    with `optim.ema_decay` the state also holds an average of the weights, for `averaged`.

    train: regex of the parameters that a stage trains; all others stay as they are. "": all.
    """
    c = config.optim

    def is_decayed(params):
        decayed = {path: bool(re.search(DECAYED, path)) for path in flat_paths(params)}
        return traverse_util.unflatten_dict(decayed, sep="/")

    def scale_by_path(updates, params=None):
        del params
        scaled = {}
        for path, update in flat_paths(updates).items():
            factor = next((f for regex, f in c.multipliers if re.search(regex, path)), 1.0)
            factor = factor if re.search(train, path) else 0.0
            scaled[path] = update * factor
        return traverse_util.unflatten_dict(scaled, sep="/")

    steps = [
        optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate(config), b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=is_decayed
        ),
        optax.stateless(scale_by_path) if c.multipliers or train else optax.identity(),
    ]
    return optax.chain(*steps, *([average_weights(c.ema_decay)] if c.ema_decay else []))


def average_weights(decay: float) -> optax.GradientTransformation:
    """Leaves the updates as they are and keeps an exponential moving average of the weights (Polyak
    and Juditsky 1992) they lead to. After n updates its decay is the lower of `decay` and
    (1 + n) / (10 + n), so that weights drawn at random are soon forgotten."""

    def update(updates, state, params):
        weights = optax.apply_updates(params, updates)
        count = state.count.astype(jnp.float32)
        share = 1.0 - jnp.minimum(decay, (1.0 + count) / (10.0 + count))
        ema = jax.tree.map(lambda old, new: old + share * (new - old), state.ema, weights)
        return updates, optax.EmaState(state.count + 1, ema)

    return optax.GradientTransformation(
        lambda params: optax.EmaState(jnp.int32(0), jax.tree.map(jnp.copy, params)), update
    )


def averaged(params, opt_state):
    """The average of the weights, if `opt_state` holds one, else `params`: what is evaluated."""
    return optax.tree.get(opt_state, "ema", params)
