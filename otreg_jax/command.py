"""Running a command: its flags, and one line instead of a trace where the user can act."""

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from absl import flags, logging

USAGE = 2  # exit status after flags that cannot be meant


def run(
    main: Callable[[flags.FlagValues, list[str]], int | None],
    define_flags: Callable[[SimpleNamespace], None],
    argv: Sequence[str] | None = None,
    *,
    program: str = "",
    required: Sequence[str] = (),
    arguments: str = "",
    check: Callable[[Sequence[str]], Sequence[str]] = lambda argv: (),
) -> int:
    """Runs a command as every one of this package wants it: warnings only, compiled programs kept
    between processes, errors in one line.

    Errors raised on purpose by this package (their `raise` stands in its own files, in the
    command's or in a recipe), and those of files, are such; anything else is a bug and keeps its
    trace.

    Args:
      main: of the flags' values and of the other arguments; its result is the exit status.
      define_flags: defines the flags with the functions it is given, absl's DEFINE_string as
        `string` and so on (and the flags themselves as `values`).
      argv: the command line without the program; by default that of this process.
      program: what the user typed to come here, for messages; by default python and the module.
      required: flags that must be given.
      arguments: what else must be given, for messages: "FILE..."; "": nothing may.
      check: says what is wrong with a command line before its flags are parsed.

    Returns:
      The exit status: that of `main` (0 for None), 1 after an error, 2 after a wrong command line.
    """
    home = main.__globals__  # of the command's module
    spec = home["__spec__"]
    program = program or f"python {f'-m {spec.name}' if spec else sys.argv[0]}"
    values = _flags(define_flags)
    argv = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    problems = [*check(argv)]
    try:
        rest = [] if problems else values(argv)[1:]
    except flags.Error as error:
        problems = [str(error)]
    if not problems and values.help:
        lines = (
            f"  --{name}{'=' * bool(default)}{default}: {x}"
            for name, default, x in _describe(values)
        )
        print(home["__doc__"], "flags:", *lines, sep="\n")
        return 0
    if not problems:
        problems = [f"--{flag} is missing" for flag in required if values[flag].value is None]
        if rest and not arguments:
            problems.append(f"unexpected arguments {rest}; flags look like --config.num_steps=10")
        if arguments and not rest:
            problems.append(f"{arguments} is missing")
    if problems:
        return _say(problems, f"try: {program} --help", USAGE)
    if not flags.FLAGS.is_parsed():  # libraries read theirs
        flags.FLAGS.mark_as_parsed()
    if "jax" in sys.modules:  # which what computes has imported
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


def quiet_and_cached() -> None:
    """Log warnings only, and keep compiled programs between processes."""
    import jax  # here: not every command needs it

    logging.set_verbosity(logging.WARNING)
    if not jax.config.jax_compilation_cache_dir:
        cache = os.path.expanduser("~/.cache/otreg_jax")
        jax.config.update("jax_compilation_cache_dir", cache)


def flags_of(cli: functools.partial) -> list[tuple[str, str, str]]:
    """(name, default or "", meaning) of every flag of a command.

    cli: `run` with the command's own first arguments.
    """
    _, define_flags = cli.args
    return _describe(_flags(define_flags))


def _flags(define_flags: Callable[[SimpleNamespace], None]) -> flags.FlagValues:
    """The flags that a command defines, and --help."""
    values = flags.FlagValues()
    define = SimpleNamespace(values=values)
    for kind in ("string", "integer", "float", "bool", "enum", "list", "multi_string"):
        function = getattr(flags, f"DEFINE_{kind}")
        setattr(define, kind, functools.partial(function, flag_values=values))
    define_flags(define)
    define.bool("help", False, "Show this.", short_name="h")
    values.set_gnu_getopt(True)  # flags may stand behind other arguments
    return values


def _describe(values: flags.FlagValues) -> list[tuple[str, str, str]]:
    """(name, default or "", meaning) of every flag, by name."""
    described = []
    for name in sorted(values.flag_values_dict()):
        if len(name) > 1:
            default = values[name].default
            shown = "" if default in (None, "", [], False) else f"{default}".replace("\n", "\\n")
            described.append((name, shown, values[name].help.partition("\n")[0]))
    return described


def _say(problems: Sequence[str], hint: str, status: int) -> int:
    print(*(f"error: {problem}" for problem in problems), file=sys.stderr, sep="\n")
    if hint:
        print(hint, file=sys.stderr)
    return status
