"""What can be known to be wrong with a run before its data are read or anything is compiled."""

import importlib.util
import os
import re

import jax
from ml_collections import ConfigDict

from otreg_jax import (
    allowed,
    build,
    checkpoint,
    losses,
    optim,
    rules,
    rundir,
    settings,
    stages,
)
from otreg_jax import config as config_lib
from otreg_jax.data import readers, records, sets, sources, spoken, text
from otreg_jax.models import lora
from otreg_jax.pretrained import load


def check(config: ConfigDict) -> None:
    """Raises one ValueError that lists everything wrong with the values, and every file or
    directory that they name and that is not there. What is remote is left alone."""
    config_lib.raise_problems(config_lib.problems(config) + missing_files(config))


def missing_files(config: ConfigDict) -> list[str]:
    """A line, with the key, for everything that settings name and that is not there."""
    lines, values = [], config_lib.flatten(config)
    for key, row in settings.TABLE.items():
        value, look = values.get(key), LOOKS.get(row.allowed)
        if not (value and look) or not row.allowed.accepts(value):
            continue
        revision = values.get(key.removesuffix("path") + "revision") or None
        for shown, path in _named(row.allowed, value):
            problem = "" if "://" in path else look(path, revision)
            lines += [f"{key}={shown!r}: {problem}"] if problem else []
    return lines


def _named(kind: allowed.Allowed, value: str) -> list[tuple[str, str]]:
    """(as it is written, path) of everything that a value of this kind names."""
    if kind is allowed.NAMED_MANIFESTS:
        return [(f"{name}={path}", path) for name, path in sets.named_manifests(value).items()]
    if kind is allowed.SENTENCES:
        return [(path, path) for _, path in spoken.files(value)]
    paths = value.split(",") if kind in (allowed.MANIFESTS, allowed.WRITERS) else [value]
    return [(path.strip(), path.strip()) for path in paths]


def _look_for_data(path: str, revision) -> str:
    if readers.find(path):
        return ""
    split = sources.split_of(path)
    if split is None:
        return "" if os.path.isfile(path) else "no such manifest, and no data set"
    try:
        records.shards(*split)
    except FileNotFoundError as error:
        return str(error)
    return ""


def _look_for_model(path: str, revision) -> str:
    return load.source_problem(path, revision)


def _look_for_tokenizer(path: str, revision) -> str:
    return "" if os.path.exists(path) else "no such file or directory"


def _look_for_file(path: str, revision) -> str:
    return "" if os.path.isfile(path) else "no such file"


def _look_for_folder(path: str, revision) -> str:
    return "" if os.path.isdir(path) else "no such directory"


def _look_for_writer(name: str, revision) -> str:
    is_here = name == "tensorboard" or importlib.util.find_spec(name)
    return "" if is_here else f'not installed: pip install "otreg_jax[{name}]"'


LOOKS = {
    allowed.WRITERS: _look_for_writer,
    allowed.MANIFEST: _look_for_data,
    allowed.MANIFESTS: _look_for_data,
    allowed.NAMED_MANIFESTS: _look_for_data,
    allowed.MODEL: _look_for_model,
    allowed.TOKENIZER: _look_for_tokenizer,
    allowed.SENTENCES: _look_for_file,
    allowed.FOLDER: _look_for_folder,
}


def check_model(config: ConfigDict, mesh: jax.sharding.Mesh | None = None) -> None:
    """Raises one ValueError that lists what is wrong with settings that speak of the model: regexes
    that match none of its parameters, or all, `otreg.layer`, `otreg.layer_weights`,
    `encoder.keep`. Nothing is computed; of pretrained models config.json is read."""
    prompt = text.Prompt((), (), 0)  # no parameter depends on it, nor a path on the vocabulary
    vocab_size = 0 if config.llm.path else config.tokenizer.vocab_size
    slm = build.modules(config, vocab_size, prompt, config.llm.path, mesh)
    without_lora = config.copy_and_resolve_references()
    without_lora.lora.pattern = ""
    params = jax.eval_shape(lambda: build.init_params(slm, without_lora))
    num_layers, wrong = slm.llm.config.num_layers, {}
    for stage in stages.stages_of(config):
        otreg = stage.config.otreg
        wrong[f"otreg.layer={otreg.layer}"] = rules.layer_problem(otreg.layer, num_layers)
        key = f"otreg.layer_weights={otreg.layer_weights}"
        wrong[key] = rules.layer_weights_problem(otreg.layer_weights, num_layers)
    lines = [f"{key}: {problem}" for key, problem in wrong.items() if problem]
    config_lib.raise_problems(lines + pattern_problems(config, params))


def pattern_problems(config: ConfigDict, params) -> list[str]:
    """Lines about `freeze`, `lora.pattern`, `optim.multipliers` and what stages train, that match
    nothing, everything or each other, and about `encoder.keep` of an encoder that is trained;
    `params`: shapes of all parameters, without low-rank pairs."""
    lines, key = [], jax.random.key(0)
    freeze, pattern = config.freeze, config.lora.pattern
    if pattern:
        try:
            params = jax.eval_shape(lambda p: lora.add(p, pattern, config.lora.rank, key), params)
        except ValueError as error:
            lines.append(f"lora.pattern={pattern!r}: {error}")
    paths = optim.flat_paths(params)
    trained = [path for path in paths if not (freeze and re.search(freeze, path))]
    some = ", ".join([*paths][:: max(len(paths) // 4, 1)])
    if freeze and len(trained) == len(paths):
        lines.append(f"freeze={freeze!r}: matches no parameter; there are e.g. {some}")
    if not trained:
        lines.append(f"freeze={freeze!r}: matches every parameter, nothing would be trained")
    stuck = [path for path in paths if path.endswith("lora_b") and path not in trained]
    if stuck:
        lines.append(
            f"freeze={freeze!r}, lora.pattern={pattern!r}: freeze also matches the low-rank pairs, "
            f"which would stay without effect ({stuck[0]}, ...); leave them out of it: "
            f"{freeze + '(?!.*/lora_[ab]$)'!r}, say"
        )
    lines += [
        f"optim.multipliers: {regex!r} matches no parameter that is trained"
        for regex, _ in config.optim.multipliers
        if not any(re.search(regex, path) for path in trained)
    ]
    lines += [
        f"stages.{stage.name}.train={stage.train!r}: matches no parameter that is trained"
        for stage in stages.stages_of(config)
        if stage.train and not any(re.search(stage.train, path) for path in trained)
    ]
    moving = [path for path in trained if path.startswith("encoder/")]
    if config.encoder.keep and moving:
        lines.append(f"encoder.keep=True: the encoder is trained ({moving[0]}, ...); freeze it all")
    return lines


def stored_config(workdir, config: ConfigDict) -> ConfigDict | None:
    """The configuration of the run that `workdir` holds checkpoints of, None if there is none.

    Raises:
      ValueError: it is another run's, naming every key that differs and may not; or damaged.
    """
    path = rundir.of(workdir).config
    if not (path.exists() and checkpoint.exists(workdir)):
        return None
    stored = config_lib.load(path)
    different = config_lib.differences(stored, config)
    if different:
        raise ValueError(
            f"{workdir} holds checkpoints of another configuration (stored -> now):\n  "
            + "\n  ".join(different)
            + "\nuse another --workdir, or remove this one"
        )
    return stored


def position_weight(config: ConfigDict):
    """A function of a step of the run: gamma."""

    def weight(step: int):
        stage = stages.at(stages.stages_of(config), step)
        return losses.make_schedules(stage.config, stage.start).position_weight(step)

    return weight


def resume_notes(stored: ConfigDict, config: ConfigDict, step: int) -> list[str]:
    """Lines about what goes on otherwise from `step` than it would have with the stored
    configuration: schedules are stretched over `num_steps`."""
    before, now = stored.num_steps, config.num_steps
    if before == now:
        return []
    if step >= now:
        return [f"num_steps={now}: the run is at step {step} already, nothing is left to train"]
    schedules = {"the learning rate": lambda c: optim.learning_rates(stages.stages_of(c))}
    if stages.at(stages.stages_of(config), step).config.otreg.weight:
        schedules["otreg's position_weight"] = position_weight
    values = {
        name: [float(schedule(c)(step)) for c in (stored, config)]
        for name, schedule in schedules.items()
    }
    moved = [f"{name} {b:.3g} instead of {a:.3g}" for name, (a, b) in values.items() if a != b]
    return (
        [f"num_steps: {before} -> {now}: from step {step} on {', '.join(moved)}"] if moved else []
    )
