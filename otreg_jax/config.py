"""The configuration as recipes and commands meet it: an ml_collections ConfigDict of the settings.

A recipe (configs/*.py) starts from `default()` and changes keys; the command line changes them
again (`--config.otreg.weight=1`). A run directory keeps the resolved result in config.json. The
table of all keys is in settings.py;

    python -m otreg_jax.config              # prints it
    python -m otreg_jax.config --markdown > docs/configuration.md
"""

import collections
import difflib
import functools
import json
import runpy
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict, config_flags

from otreg_jax import command, rules, rundir, settings, stages
from otreg_jax.data import text

HERE = Path(__file__).parent
# Of an installed package; in a checkout they are where users edit them.
RECIPES = next(
    (f for f in (HERE / "recipes", HERE.parent / "configs") if f.is_dir()), HERE / "recipes"
)
PARTS = ("encoder", "adapter", "llm")  # of a model


def default() -> ConfigDict:
    """The default configuration; on the command line tuples look like `--config.key="(1, 2)"`."""
    nested = {}
    for key, setting in settings.TABLE.items():
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = setting.default
    nested["stages"], nested["tasks"] = {}, {}
    config = ConfigDict(nested)
    for part in PARTS:  # their defaults follow those of the whole
        for key in ("path", "revision"):
            config[part][key] = config.model.get_oneway_ref(key)
    return config


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """{"data.train": value, ...}"""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def suggest(name: str, known) -> str:
    """' (did you mean 'x'?)' if a known name is close, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check(config: ConfigDict) -> None:
    """Raises one ValueError that lists everything wrong with the configuration's values."""
    raise_problems(problems(config))


def raise_problems(lines: list[str]) -> None:
    """Raises one ValueError of these lines, if there is one."""
    if lines:
        raise ValueError("config: " + "\n        ".join(lines))


def problems(config: ConfigDict) -> list[str]:
    """A line, with the key and what is allowed, for everything wrong with the values."""
    values = _leaves(config)
    lines, bad = [], set()
    for key, value in values.items():
        row = settings.find(key)
        if row is None:
            lines.append(f"{key}={value!r}: no such setting{suggest(key, settings.TABLE)}")
        elif not row.allowed.accepts(value):
            bad.add(key)
            lines.append(f"{key}={value!r}: must be {row.allowed.words}")
    if not any(key.startswith("stages.") for key in bad):
        lines += stages.problems(config)
    templates = values.get("synthetic.num_train") and not values.get("synthetic.sentences")
    needed = settings.NEEDED if templates else ()
    missing = collections.defaultdict(list)
    for key in (*settings.TABLE, *needed):
        if key not in values:
            missing[key.rpartition(".")[0]].append(key)
    lines += [f"{group or 'it'} lacks {', '.join(keys)}" for group, keys in missing.items()]
    lines += _broken_rules(values, bad)
    for stage in () if lines or not config.stages else stages.stages_of(config):
        broken = _broken_rules(_leaves(stage.config), bad)
        lines += [f"stages.{stage.name} ({stage.config.num_steps} steps): {x}" for x in broken]
    return lines


def _broken_rules(values: dict, bad: set) -> list[str]:
    lines = []
    for rule in rules.RULES:
        if bad.isdisjoint(rule.keys) and values.keys() >= set(rule.keys):
            problem = rule.problem(*(values[key] for key in rule.keys))
            lines += [f"{_shown(rule.keys, values)}: {problem}"] if problem else []
    return lines


def _leaves(config: ConfigDict) -> dict[str, object]:
    """{"data.train": value, ...}; the values of `synthetic`'s keys as they stand there, whole."""
    rest = {key: value for key, value in config.items() if key != "synthetic"}
    synthetic = config.get("synthetic") or {}
    return flatten(rest) | {f"synthetic.{key}": value for key, value in synthetic.items()}


def _shown(keys, values) -> str:
    """The first key and those that do not have their default, with their values."""
    is_default = lambda key: values[key] == settings.TABLE[key].default
    shown = [key for key in keys if key == keys[0] or not is_default(key)]
    return ", ".join(f"{key}={values[key]!r}" for key in shown)


def otreg_options(config: ConfigDict) -> dict:
    """The arguments of `otreg.regularizer` that the configuration fixes."""
    names = (
        "text_set",
        "text_mass",
        "center",
        "cost",
        "epsilon",
        "num_iters",
        "speech_tau",
        "plan",
        "backend",
    )
    return {name: config.otreg[name] for name in names}


def target_layers(config: ConfigDict) -> dict[int, float]:
    """{layer: its share of OTReg's loss}, of `otreg.layer_weights` if that is given."""
    shares = enumerate(config.otreg.layer_weights or ())
    return {layer: share for layer, share in shares if share} or {config.otreg.layer: 1.0}


def profile_window(config: ConfigDict) -> tuple[int, int]:
    """The first step of `profile` and the one after its last; (-1, -1) if there is none."""
    return rules.profile_window(config.profile)


def save(config: ConfigDict, path) -> None:
    """Writes the resolved configuration as JSON, whole or not at all."""
    rundir.write_json(path, config.to_dict())


def load(path) -> ConfigDict:
    """Reads a configuration written by `save` over today's defaults.

    Raises:
      ValueError: the file is damaged, has keys that this version does not know, or values of
        another type; everything is named.
    """
    remedy = "bring it back from a copy, or use another --workdir"
    stored = rundir.read_json(path, remedy)
    try:
        flat = flatten(ConfigDict(stored))
    except (ValueError, TypeError, AttributeError) as error:  # not of keys
        raise ValueError(f"{path} is damaged, it is no configuration: {error}; {remedy}") from None
    config = default()
    known = flatten(config)

    def tuples(value):  # JSON has no tuples, configurations have no lists
        if isinstance(value, dict):
            return {key: tuples(x) for key, x in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    lines = [
        f"{key}: unknown to this version of otreg_jax{suggest(key, known)}"
        for key in flat
        if key not in known and not key.startswith(("synthetic.", "stages.", "tasks."))
    ]
    synthetic = stored.get("synthetic")
    for key, value in synthetic.items() if isinstance(synthetic, dict) else ():
        if f"synthetic.{key}" not in known:
            config.synthetic[key] = tuples(value)
    with config.unlocked():
        for group in ("stages", "tasks"):
            config[group] = tuples(stored.get(group, {}))
    for key in known.keys() & flat.keys():
        try:
            config.update_from_flattened_dict({key: tuples(flat[key])})
        except (TypeError, ValueError):
            lines.append(f"{key}={flat[key]!r}: must be {settings.TABLE[key].allowed.words}")
    if lines:
        raise ValueError(f"{path}:\n  " + "\n  ".join(sorted(lines)))
    return config


def differences(stored: ConfigDict, config: ConfigDict) -> list[str]:
    """Lines 'key: stored -> now' for every key that must not change when a run is resumed."""
    canonical = lambda value: json.loads(json.dumps(value))
    before, now = flatten(stored), flatten(config)
    may_change = lambda key: (
        key in settings.TABLE and settings.TABLE[key].on_resume != settings.FIXED
    )
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if not may_change(key) and canonical(before.get(key)) != canonical(now.get(key))
    ]


def recipe_path(name: str) -> str:
    """The file of a recipe, and behind a colon its argument, if there is one: "my/recipe.py:ce" as
    it is, "quickstart:ce", the name of one that is shipped, as "FOLDER/quickstart.py:ce"."""
    stem, colon, argument = name.partition(":")
    shipped = RECIPES / f"{stem}.py"
    return f"{shipped}{colon}{argument}" if shipped.is_file() else name


def load_recipe(name: str) -> ConfigDict:
    """The configuration that a recipe gives, see `recipe_path`.

    Raises:
      ValueError: there is no such file, or it fails; the message names its line.
    """
    path, _, argument = recipe_path(name).partition(":")
    if not Path(path).is_file():
        names = sorted(p.stem for p in RECIPES.glob("*.py"))
        close = suggest(Path(path).stem, names)
        raise ValueError(f"{path}: no such file{close}; shipped are {', '.join(names)}")
    try:
        return runpy.run_path(path)["get_config"](*([argument] if argument else []))
    except Exception as error:  # a recipe is the user's own code
        if type(error) is ValueError:  # raised on purpose, it says what is wrong
            raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: {type(error).__name__}: {reason}{_import_hint(error, path)}"
        ) from error


def _import_hint(error: Exception, path: str) -> str:
    if not isinstance(error, ImportError):
        return ""
    sibling = (error.name or "").partition(".")[0]
    if "relative import" not in str(error) and not Path(path).with_name(f"{sibling}.py").is_file():
        return ""
    return (
        "; a recipe runs alone, it reads one beside it by "
        "runpy.run_path(str(Path(__file__).with_name('other.py')))"
    )


def define_flag(define) -> None:
    """The flag of a recipe, and with it those of its settings (--config.KEY=VALUE)."""
    meaning = "Recipe: a file, or the name of one that is shipped (quickstart)."
    config_flags.DEFINE_config_file("config", None, meaning, flag_values=define.values)
    parser = define.values["config"].parser
    parse = parser.parse
    parser.parse = lambda name: parse(recipe_path(name))


def check_flags(argv: Sequence[str]) -> list[str]:
    """What is wrong with the --config file, or the settings that it has not and that are set."""
    flag_of = lambda argument: argument.lstrip("-").partition("=")
    given = [
        (*flag_of(argument), after)
        for argument, after in zip(argv[1:], [*argv[2:], ""], strict=True)
        if argument.startswith("-")
    ]
    recipe = next((v if eq else after for name, eq, v, after in given if name == "config"), "")
    if not recipe:
        return []  # that is said elsewhere
    try:
        known = flatten(load_recipe(recipe)) | settings.TABLE
    except ValueError as error:
        return [str(error)]
    keys = [name.removeprefix("config.") for name, *_ in given if name.startswith("config.")]
    groups = {key[:i] for key in known for i, letter in enumerate(key) if letter == "."}
    return [
        f"--config.{key}: unknown key{suggest(key, known)}"
        for key in keys
        if key not in known and key not in groups
    ]


def given(values) -> ConfigDict:
    """The configuration that the flags of a command give: a recipe's, with what was typed."""
    values.config.prompt = text.from_shell(values.config.prompt)
    return values.config


def as_text() -> str:
    """The table of settings: a line a key, and under it what it means and may be."""
    lines = []
    for row in settings.ROWS:
        lines.append(f"{row.key} = {row.default!r}" if row.key in settings.TABLE else row.key)
        words = "; ".join(filter(None, (row.meaning, row.allowed.words)))
        lines += textwrap.wrap(words, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def as_markdown() -> str:
    """docs/configuration.md: the table of settings, a section a group."""
    cell = lambda text: text.replace("|", "\\|").replace("\n", "\\n")
    sections = collections.defaultdict(list)
    for row in settings.ROWS:
        default = f"`{row.default!r}`" if row.key in settings.TABLE else ""
        cells = (f"`{row.key}`", default, row.allowed.words, row.meaning, row.on_resume)
        sections[row.key.rpartition(".")[0]].append("| " + " | ".join(map(cell, cells)) + " |")
    head = "| key | default | must be | meaning | on resume |\n| --- | --- | --- | --- | --- |"
    parts = ["# Configuration", INTRODUCTION]
    for name, rows in sections.items():
        parts += [f"## {name or 'The run'}", "\n".join([head, *rows])]
    return "\n\n".join(parts)


INTRODUCTION = """\
Made from otreg_jax/settings.py by `python -m otreg_jax.config --markdown > docs/configuration.md`.

A recipe (`configs/*.py`) starts from these defaults and changes keys; the command line changes
them again: `--config.otreg.weight=1`, tuples as `--config.encoder.strides="(2, 2)"`. Everything
wrong with a configuration is said in one message before data are read or anything is compiled. A
run that is resumed must keep every key, but for those where the last column says otherwise."""


def main(values, _) -> None:
    print(as_markdown() if values.markdown else as_text())


cli = functools.partial(
    command.run, main, lambda define: define.bool("markdown", False, "As docs/configuration.md.")
)

if __name__ == "__main__":
    sys.exit(cli())
