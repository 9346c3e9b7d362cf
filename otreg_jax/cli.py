"""The command `otreg`: every command of this package under one name.

    otreg train --config=quickstart --workdir=runs/quickstart
    otreg COMMAND --help

`otreg train` is `python -m otreg_jax.train`, and so on. A command's module is imported when the
command is given, so that help is there at once. docs/commands.md is made here:

    python -m otreg_jax.cli --markdown > docs/commands.md
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Sequence

import otreg_jax

COMMANDS = {  # name: (module, what it does)
    "train": ("train", "train a model; goes on where it was stopped"),
    "evaluate": ("evaluate", "error rates with intervals, alignment figures, a report"),
    "transcribe": ("transcribe", "audio files to text or subtitles"),
    "align": ("align", "the times of words, from transport plans"),
    "export": ("export", "write a trained model in Hugging Face layout"),
    "prepare": ("data.prepare", "turn a corpus into files that train at disk speed"),
    "sweep": ("sweep", "train and evaluate many settings, in one table"),
    "aot": ("aot", "compile a recipe for a TPU slice that is not there: does it fit?"),
    "tokens": ("data.text", "show one training example, token by token"),
    "config": ("config", "list every setting, its default and its meaning"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        print(otreg_jax.__version__)
    elif name == "--markdown":
        print(as_markdown())
    elif name in COMMANDS:
        return _module(name).cli(rest, program=f"otreg {name}")
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        print(f"error: there is no command {name!r}{hint}\ntry: otreg --help", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """What `otreg --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        [
            f"otreg_jax {otreg_jax.__version__}: speech recognition by speech encoder, adapter and "
            "LLM, with\nOptimal Transport Regularization.",
            "",
            "  otreg train --config=quickstart --workdir=runs/quickstart",
            "  otreg evaluate --workdir=runs/quickstart",
            "  otreg COMMAND --help",
            "",
            *lines,
            "",
            "--config is the file of a recipe, or the name of one that is shipped.",
            "otreg --version prints the version.",
        ]
    )


def as_markdown() -> str:
    """docs/commands.md: of each command its module's text and a table of its flags."""
    from otreg_jax import command  # here: help needs no absl

    cell = lambda text: text.replace("|", "\\|").replace("<", "&lt;")
    parts = ["# Commands", INTRODUCTION]
    for name in COMMANDS:
        module = _module(name)
        parts += [f"## otreg {name}", inspect.cleandoc(module.__doc__)]
        rows = [
            f"| `--{flag}` | {f'`{default}`' if default else ''} | {cell(meaning)} |"
            for flag, default, meaning in command.flags_of(module.cli)
        ]
        parts.append("\n".join(["| flag | default | meaning |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


INTRODUCTION = """\
Made from the commands themselves by `python -m otreg_jax.cli --markdown > docs/commands.md`.

Each command also runs as `python -m otreg_jax.MODULE`. Flags may stand before or behind other
arguments, as `--flag=value` or `--flag value`. The exit status is 0 if all went well, 1 after an
error, 2 after a wrong command line, and 75 if training was told to stop: start it again."""


def _module(name: str):
    return importlib.import_module(f"otreg_jax.{COMMANDS[name][0]}")


if __name__ == "__main__":
    sys.exit(main())
