"""What settings must be to one another: the checks that the table's rows cannot make alone."""

import math
from collections.abc import Callable
from typing import NamedTuple

from otreg_jax.data import features
from otreg_jax.models.adapter import AdapterConfig


class Rule(NamedTuple):
    """`problem` of the values of `keys` says what is wrong with them together, "" if nothing is."""

    keys: tuple[str, ...]
    problem: Callable[..., str]


RULES: list[Rule] = []


def rule(*keys: str):
    """Adds a function of the values of these keys to RULES."""

    def add(problem):
        RULES.append(Rule(keys, problem))
        return problem

    return add


@rule("data.train", "synthetic.num_train", "synthetic.sentences")
def _training_data(train, num_train, sentences):
    if not train and not num_train and not sentences:
        return "no training data: set data.train to a manifest (see README, 'Your own data')"
    return ""


@rule("eval_every", "data.dev", "synthetic.num_train", "synthetic.sentences")
def _dev_set(eval_every, dev, num_train, sentences):
    if eval_every and not dev and not num_train and not sentences:
        return "it needs a dev set: set data.dev"
    return ""


@rule("data.weights", "data.mixture", "data.temperature")
def _shares(weights, mixture, temperature):
    if weights and (mixture or temperature != 1):
        return "the weights are the shares of the manifests; leave the others at their defaults"
    return ""


@rule("checkpoint_every", "eval_every")
def _dev_losses(checkpoint_every, eval_every):
    if eval_every and checkpoint_every % eval_every:
        return "it must be a multiple of eval_every, so that each checkpoint has a dev loss"
    return ""


@rule("keep_every", "checkpoint_every")
def _durable(keep_every, checkpoint_every):
    return "it must be a multiple of checkpoint_every" if keep_every % checkpoint_every else ""


@rule("profile", "num_steps")
def _profile(profile, num_steps):
    start, stop = profile_window(profile)
    if profile and not 0 <= start < stop <= num_steps:
        return "it must be START:STOP, two steps up to num_steps"
    return ""


@rule("mesh.data", "mesh.fsdp", "mesh.tensor")
def _mesh(*sizes):
    return "at most one axis may be -1" if sizes.count(-1) > 1 else ""


@rule("otreg.start_step", "num_steps")
def _stage_2(start_step, num_steps):
    if start_step and start_step >= num_steps:
        return "it must be below num_steps: stage 2 would never start"
    return ""


@rule("optim.restart_step", "num_steps")
def _restart(restart_step, num_steps):
    return "it must be below num_steps" if restart_step and restart_step >= num_steps else ""


@rule("optim.warmup_steps", "num_steps", "optim.restart_step")
def _warm_up(warmup_steps, num_steps, restart_step):
    if warmup_steps > num_steps:
        return "the warm-up must not be longer than the run"
    if restart_step and warmup_steps > min(restart_step, num_steps - restart_step):
        return "the warm-up must not be longer than what comes before or after the restart"
    return ""


@rule("infonce.weight", "accumulation")
def _infonce(weight, accumulation):
    if weight and accumulation > 1:
        return "the contrastive loss needs the whole batch at once: set accumulation=1"
    return ""


@rule("otreg.plan", "otreg.position_weight", "otreg.position_weight_final")
def _position_plan(plan, weight, final):
    if plan == "position" and not weight:
        return "it needs position_weight above 0: its plan would be uniform"
    if plan == "position" and final == 0:
        return "with a position_weight_final of 0 its plan would become uniform"
    return ""


@rule("otreg.structure", "otreg.plan")
def _structure(structure, plan):
    if structure and plan == "position":
        return "otreg.plan=position is the control that never looks at the embeddings: set it to 0"
    return ""


@rule("otreg.layer_weights", "otreg.layer", "llm.num_layers", "llm.path")
def _layer_weights(weights, layer, num_layers, path):
    if weights and (len(weights) <= layer or not weights[layer]):
        return "otreg.layer, the one that is measured, must be one of those with a weight"
    return "" if path else layer_weights_problem(weights, num_layers)


@rule("otreg.after_ctc", "otreg.weight", "ctc.weight")
def _after_ctc(after_ctc, weight, ctc_weight):
    if after_ctc and weight and not ctc_weight:
        return "it needs ctc.weight above 0: what CTC hears decides what remains"
    return ""


@rule("otreg.layer", "llm.num_layers", "llm.path")
def _layer(layer, num_layers, path):
    return "" if path else layer_problem(layer, num_layers)


def layer_weights_problem(weights: tuple[float, ...], num_layers: int) -> str:
    """What is wrong with `otreg.layer_weights` in an LLM of so many layers, "" if nothing is."""
    if len(weights) <= num_layers:
        return ""
    return f"at most {num_layers}: of the embeddings and of all layers but the last"


def layer_problem(layer: int, num_layers: int) -> str:
    """What is wrong with `otreg.layer` in an LLM of so many layers, "" if nothing is."""
    return "" if layer < num_layers else f"it must be 0 to {num_layers - 1}, below the last layer"


@rule(
    "encoder.keep",
    "data.features",
    "data.augment.speeds",
    "data.augment.noise",
    "data.augment.rir",
    "data.augment.time_masks",
    "data.augment.freq_masks",
)
def _kept_encoder_outputs(keep, features, speeds, *others):
    if keep and (features != "host" or any(others) or any(speed != 1 for speed in speeds)):
        return "what is computed once cannot be augmented, nor come from data.features=step"
    return ""


@rule("data.window", "data.window_masked", "data.features", "data.max_duration")
def _window(window, masked, features, max_duration):
    if masked and not window:
        return "there is no silence to mask: set data.window"
    if window and features != "host":
        return "silence is added on the host: set data.features=host"
    if window and max_duration > window:
        return "audio must fit into the window: set data.max_duration to it"
    return ""


@rule("encoder.embed_dim", "encoder.num_heads", "encoder.path")
def _encoder_heads(embed_dim, num_heads, path):
    return "" if path or embed_dim % num_heads == 0 else "heads must divide the width"


@rule("llm.num_heads", "llm.num_kv_heads", "llm.path")
def _llm_heads(num_heads, num_kv_heads, path):
    if not path and num_heads % num_kv_heads:
        return "num_heads must be a multiple of num_kv_heads"
    return ""


@rule("adapter.kind", "adapter.hidden_dim", "adapter.num_heads")
def _adapter(kind, hidden_dim, num_heads):
    try:
        AdapterConfig(1, 1, kind=kind, hidden_dim=hidden_dim, num_heads=num_heads)
    except ValueError as error:
        return str(error)
    return ""


@rule("adapter.norm", "adapter.path")
def _adapter_norm(norm, path):
    return "the adapter of adapter.path has no such norm" if norm != "none" and path else ""


@rule("data.augment.freq_width", "data.augment.freq_masks", "data.num_mels")
def _freq_masks(width, masks, num_mels):
    return "masks must not be wider than the mel bins" if masks and width > num_mels else ""


@rule("data.augment.time_width", "data.augment.time_masks", "data.max_duration")
def _time_masks(width, masks, max_duration):
    if masks and width > math.ceil(max_duration * features.SAMPLE_RATE / features.HOP):
        return "masks must not be wider than the longest audio (100 frames a second)"
    return ""


def profile_window(profile: str) -> tuple[int, int]:
    """The first step of `profile` and the one after its last; (-1, -1) if there is none."""
    start, _, stop = profile.partition(":")
    return (int(start), int(stop)) if start.isdecimal() and stop.isdecimal() else (-1, -1)
