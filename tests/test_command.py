"""Commands: absl flags, one line for what a user can mend, no flag defined by an import."""

import importlib
import pkgutil
import subprocess
import sys

import pytest
from absl import flags
from toy import toy_config
from toy_run import write_recipe

import otreg_jax
from otreg_jax import command
from otreg_jax import config as config_lib


def define_flags(define):
    define.string("workdir", None, "Directory of the run.")
    define.integer("batch_size", 16, "Utterances at once.", 1)
    define.bool("json", False, "Print JSON.")


def main(values, arguments):
    """Prints what it was given, or raises what the workdir names."""
    print(values.workdir, values.batch_size, values.json, arguments)
    if values.workdir == "ours":
        raise ValueError("say this")
    if values.workdir == "theirs":
        int("x" * 9)
    if values.workdir == "file":
        open("/nowhere/at/all")
    if values.workdir == "bug":
        importlib.import_module("json").loads("{")
    return 3 if values.workdir == "status" else None


def run(*argv, **options):
    return command.run(main, define_flags, argv, required=["workdir"], **options)


def test_flags_may_stand_behind_other_arguments(capsys):
    assert run("a.wav", "--workdir=x", "-", "--json", "--batch_size", "3", arguments="FILE...") == 0
    assert capsys.readouterr().out == "x 3 True ['a.wav', '-']\n"
    assert run("--workdir=status") == 3


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--workdir is missing"),
        (["--workdir=x", "y"], "unexpected arguments ['y']"),
        (["--workdir=x", "--batch_size=0"], "--batch_size=0"),
        (["--workdir=x", "--batch_size=many"], "--batch_size=many"),
        (["--workdir=x", "--batchsize=2"], "Unknown command line flag 'batchsize'"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, message, capsys):
    assert run(*argv) == command.USAGE
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert hint.startswith("try: python ") and hint.endswith(" --help")
    assert run("--workdir=x", arguments="FILE...") == command.USAGE
    assert capsys.readouterr().err.startswith("error: FILE... is missing")


def test_help_says_what_the_module_is_for_and_lists_its_flags(capsys):
    assert run("--help") == run("-h") == 0
    out = capsys.readouterr().out
    assert out.startswith(__doc__)
    assert "  --batch_size=16: Utterances at once.\n" in out


def test_errors_raised_on_purpose_are_one_line_and_bugs_keep_their_trace(capsys):
    for workdir, line in (("ours", "error: say this\n"), ("file", "error: [Errno 2]")):
        assert run(f"--workdir={workdir}") == 1
        assert capsys.readouterr().err.startswith(line)
    with pytest.raises(ValueError, match="Expecting property name"):
        run("--workdir=bug")


def test_a_prompt_typed_in_a_shell_has_line_ends(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, toy_config())
    argv = [f"--config={recipe}", r"--config.prompt=a {speech}\nb", "--config.seed", "7"]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])

    def show(values, _):
        config = config_lib.given(values)
        print(repr(config.prompt), config.seed)

    assert command.run(show, config_lib.define_flag, check=config_lib.check_flags) == 0
    assert capsys.readouterr().out == "'a {speech}\\nb' 7\n"


def test_settings_that_a_recipe_has_not_are_named_however_they_are_written(tmp_path):
    recipe = str(write_recipe(tmp_path, toy_config()))
    keys = ["--config.otreg.wieght=1", "--config.sead", "3", "--config.optim={}", "--config.seed=1"]
    for config in (["--config", recipe], [f"--config={recipe}"], [f"-config={recipe}"]):
        assert config_lib.check_flags(["train.py", *config, *keys]) == [
            "--config.otreg.wieght: unknown key (did you mean 'otreg.weight'?)",
            "--config.sead: unknown key (did you mean 'seed'?)",
        ]


def test_all_modules_can_be_imported_together_and_define_no_flag():
    before = set(flags.FLAGS)
    names = [m.name for m in pkgutil.walk_packages(otreg_jax.__path__, "otreg_jax.")]
    modules = [importlib.import_module(name) for name in names if name != "otreg_jax.sinkhorn.ott"]
    ours = {module.__name__ for module in modules}
    defined = {flags.FLAGS.find_module_defining_flag(name) for name in set(flags.FLAGS) - before}
    assert not defined & ours


def test_data_preparation_starts_without_jax():
    """Its worker processes import it, each of them."""
    code = "import sys, otreg_jax.data.prepare; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
