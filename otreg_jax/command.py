"""Running a command: its flags, and one line instead of a trace where the user can act."""

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import jax
from absl import flags, logging
from ml_collections import config_flags

from otreg_jax import config as config_lib
from otreg_jax import decoding, settings
from otreg_jax.data import text

USAGE = 2  # exit status after flags that cannot be meant


def run(
    main: Callable[[flags.FlagValues, list[str]], int | None],
    define_flags: Callable[[SimpleNamespace], None],
    argv: Sequence[str] | None = None,
    *,
    required: Sequence[str] = (),
    arguments: str = "",
) -> int:
    """Runs a command as every one of this package wants it: warnings only, compiled programs kept
    between processes, errors in one line.

    Errors raised on purpose by this package (their `raise` stands in its own files, in the
    command's or in a recipe), and those of files, are such; anything else is a bug and keeps its
    trace.

    Args:
      main: of the flags' values and of the other arguments; its result is the exit status.
      define_flags: defines the flags with the functions it is given, absl's DEFINE_string as
        `string` and so on.
      argv: the command line without the program; by default that of this process.
      required: flags that must be given.
      arguments: what else must be given, for messages: "FILE..."; "": nothing may.

    Returns:
      The exit status: that of `main` (0 for None), 1 after an error, 2 after a wrong command line.
    """
    home = main.__globals__  # of the command's module
    name = f"-m {home['__spec__'].name}" if home["__spec__"] else sys.argv[0]
    values = flags.FlagValues()
    define = _definers(values)
    define_flags(define)
    define.bool("help", False, "Show this.", short_name="h")
    values.set_gnu_getopt(True)  # flags may stand behind other arguments
    argv = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    has_settings = "config" in values and values["config"].flag_type() == "config object"
    problems = check_settings(argv) if has_settings else []
    try:
        rest = [] if problems else values(argv)[1:]
    except flags.Error as error:
        problems = [str(error)]
    if not problems and values.help:
        print(home["__doc__"], "flags:", *_describe(values), sep="\n")
        return 0
    if not problems:
        problems = [f"--{flag} is missing" for flag in required if values[flag].value is None]
        if rest and not arguments:
            problems.append(f"unexpected arguments {rest}; flags look like --config.num_steps=10")
        if arguments and not rest:
            problems.append(f"{arguments} is missing")
    if problems:
        return _say(problems, f"try: python {name} --help", USAGE)
    if has_settings:
        values.config.prompt = text.from_shell(values.config.prompt)
    if not flags.FLAGS.is_parsed():  # libraries read theirs
        flags.FLAGS.mark_as_parsed()
    quiet_and_cached()
    try:
        return main(values, rest) or 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        raised_in = os.path.abspath(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = [os.path.dirname(os.path.abspath(path)) for path in (__file__, home["__file__"])]
        if not isinstance(error, OSError) and not any(raised_in.startswith(path) for path in ours):
            raise
        return _say([str(error)], "", 1)


def define_run(define: SimpleNamespace) -> None:
    """The flags of commands that take a trained run."""
    define.string("workdir", None, "Directory of the run.")
    define.string("checkpoint", "newest", "newest, best (the lowest dev loss) or a step.")


def define_decoding(define: SimpleNamespace) -> None:
    """The flags of commands that decode; `decode_settings` reads them."""
    default = decoding.Settings(0)
    define.integer("beam_width", default.beam_width, "Hypotheses kept; 1: greedy search.", 1)
    penalty = "Exponent of the length in beam scores."
    define.float("length_penalty", default.length_penalty, penalty)
    ngram = "Forbid repeated n-grams; 0: allow them."
    define.integer("no_repeat_ngram", default.no_repeat_ngram, ngram, 0)


def decode_settings(values: flags.FlagValues) -> decoding.Settings:
    """How the flags of `define_decoding` say to decode; max_tokens 0 is left to the command."""
    return decoding.Settings(0, values.beam_width, values.length_penalty, values.no_repeat_ngram)


def define_config(define: SimpleNamespace) -> None:
    """The flag of a recipe, and with it those of its settings (--config.KEY=VALUE)."""
    define.config_file("config", None, "Recipe, a file of configs/.")


def quiet_and_cached() -> None:
    """Log warnings only, and keep compiled programs between processes."""
    logging.set_verbosity(logging.WARNING)
    if not jax.config.jax_compilation_cache_dir:
        cache = os.path.expanduser("~/.cache/otreg_jax")
        jax.config.update("jax_compilation_cache_dir", cache)


def check_settings(argv: Sequence[str]) -> list[str]:
    """What is wrong with the --config file, or the keys that it has not and that are set."""
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
        known = config_lib.flatten(config_lib.load_recipe(recipe)) | settings.TABLE
    except ValueError as error:
        return [str(error)]
    keys = [name.removeprefix("config.") for name, *_ in given if name.startswith("config.")]
    groups = {key[:i] for key in known for i, letter in enumerate(key) if letter == "."}
    return [
        f"--config.{key}: unknown key{config_lib.suggest(key, known)}"
        for key in keys
        if key not in known and key not in groups
    ]


def _definers(values: flags.FlagValues) -> SimpleNamespace:
    kinds = ("string", "integer", "float", "bool", "enum", "list", "multi_string")
    functions = {kind: getattr(flags, f"DEFINE_{kind}") for kind in kinds}
    functions["config_file"] = config_flags.DEFINE_config_file
    bound = {kind: functools.partial(f, flag_values=values) for kind, f in functions.items()}
    return SimpleNamespace(**bound)


def _describe(values: flags.FlagValues) -> list[str]:
    lines = []
    for name in sorted(values.flag_values_dict()):
        if len(name) > 1:
            default = values[name].default
            shown = "" if default in (None, "", [], False) else f"={default}".replace("\n", "\\n")
            lines.append(f"  --{name}{shown}: {values[name].help}")
    return lines


def _say(problems: Sequence[str], hint: str, status: int) -> int:
    print(*(f"error: {problem}" for problem in problems), file=sys.stderr, sep="\n")
    if hint:
        print(hint, file=sys.stderr)
    return status
