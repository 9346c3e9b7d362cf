"""Training in stages: from which step on, which losses, at which learning rate, train what.

    c.stages = {
        "align": {"start": 0, "train": "^(adapter|ctc)/", "ce": {"weight": 0.0}, ...},
        "sft": {"start": 500, "optim": {"learning_rate": 5e-4}},
    }

A stage is a small configuration of its own. What it names stands in for what the configuration
says; what it does not name stays. Its schedules (learning rate, lambda, gamma, `otreg.start_step`)
count from its own first step over its own length, and the optimizer starts afresh with it. The
state of a run has one shape throughout, so there is one chain of checkpoints.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

# What a stage may name beside `start` and `train`; whole sections, any of their keys.
SECTIONS = ("ce", "ctc", "infonce", "kl", "optim", "otreg")


class Stage(NamedTuple):
    """Steps start <= step < stop.

    config: the run's configuration with the stage's values, `num_steps` being its own length.
    train: regex of the trainable parameters that it trains; "" trains all of them.
    """

    name: str
    start: int
    stop: int
    config: ConfigDict
    train: str


def stages_of(config) -> tuple[Stage, ...]:
    """The stages of a run in order; a configuration without any is one stage."""
    if not config.stages:
        return (Stage("", 0, config.num_steps, config, ""),)
    order = sorted(config.stages, key=lambda name: config.stages[name].start)
    starts = [config.stages[name].start for name in order]
    return tuple(
        _stage(config, name, start, stop)
        for name, start, stop in zip(order, starts, [*starts[1:], config.num_steps], strict=True)
    )


def at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that a step belongs to; after the last step, the last stage."""
    return next(stage for stage in reversed(stages) if stage.start <= step)


def is_ever_on(config, term: str) -> bool:
    """Whether any stage gives the loss `term` ("ctc", ...) a weight."""
    return any(stage.config[term].weight > 0 for stage in stages_of(config))


def problems(config) -> list[str]:
    """What is wrong with when the stages start: one line each."""
    if not config.stages:
        return []
    missing = [name for name, stage in config.stages.items() if "start" not in stage]
    if missing:
        return [f"stages.{name} lacks start, its first step" for name in missing]
    starts = sorted(stage.start for stage in config.stages.values())
    if starts[0] != 0 or starts[-1] >= config.num_steps or len(set(starts)) < len(starts):
        shown = ", ".join(map(str, starts))
        return [
            f"stages: they start at {shown}; the first must start at 0, the last before "
            f"num_steps={config.num_steps}, no two at the same step"
        ]
    return []


def _stage(config, name: str, start: int, stop: int) -> Stage:
    changed = config.copy_and_resolve_references()
    given = config.stages[name]
    for section in SECTIONS:
        changed[section].update(given.get(section, {}))
    changed.num_steps = stop - start
    with changed.unlocked():
        changed.stages = ConfigDict()
    return Stage(name, start, stop, changed, given.get("train", ""))
