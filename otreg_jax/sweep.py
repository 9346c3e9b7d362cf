"""Trains and evaluates one run for every combination of configuration values, and tabulates them.

    otreg sweep --config=configs/X.py --sweep "otreg.weight=0,1,3;seed=0,1,2"

`;` separates axes, `,` values; the runs are all combinations. `--sweep` given twice adds a second
list of runs. The axis `config` varies the recipe itself:

    otreg sweep --sweep "config=quickstart:otreg,quickstart:ce;seed=0,1,2"

Each run has a directory under --workdir. The same command again skips what is finished, resumes
what was interrupted, and repeats what failed. Written at the end: table.md
(mean and sample standard deviation over `seed`), results.jsonl, plot.png.
"""

import functools
import itertools
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from etils import epath
from matplotlib.figure import Figure

from otreg_jax import command, rundir
from otreg_jax import config as config_lib

Values = dict[str, str]  # one run: configuration key → value, as on the command line


def define_flags(define) -> None:
    define.string("config", None, "Recipe of every run, unless `config` is an axis.")
    define.multi_string("sweep", None, '"key=value,value;key=value,..."; repeatable.')
    define.multi_string("set", [], "key=value, for all runs; repeatable.")
    define.string("workdir", None, "Directory of all runs; by default runs/sweep-CONFIG.")
    define.string("metric", "wer", "Key in the sets of results.json: cer, say.")
    define.string(
        "launcher",
        "",
        'Command that trains, "bash launch/train_slurm.sh", say; by default that of this package.',
    )
    define.integer("jobs", 1, "Runs at a time.", 1)


# ------------------------------------------------------------------------------------- what to run


def split(text: str, separator: str) -> list[str]:
    """Splits outside brackets and quotes: 'a,(1, 2)' → ['a', '(1, 2)']."""
    outside = rf"(?:[^{separator}\(\[\"']|\([^)]*\)|\[[^]]*\]|\"[^\"]*\"|'[^']*')+"
    return [part.strip() for part in re.findall(outside, text)]


def parse_sweep(text: str, problems: list[str]) -> list[Values]:
    """All combinations of one --sweep; appends what is wrong with it to `problems`."""
    axes: dict[str, list[str]] = {}
    for axis in split(text, ";"):
        key, equals, rest = (part.strip() for part in axis.partition("="))
        values = split(rest, ",")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            problems.append(f"{axis!r} is not of the form key=value,value")
        elif key in axes:
            problems.append(f"{key} is swept twice in {text!r}")
        elif not values or rest.strip(", ") != rest or ",," in rest:
            problems.append(f"{key} lacks a value in {axis!r}")
        elif len(set(values)) < len(values):
            problems.append(f"{key} has the same value twice in {axis!r}")
        else:
            axes[key] = values
    if not text.strip("; "):
        problems.append(f"--sweep {text!r} names nothing")
    if not axes:
        return []
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def load_recipe(name: str, problems: list[str]) -> set[str] | None:
    """Keys that the recipe 'file.py' or 'file.py:argument' can be given; None if it cannot load."""
    try:
        return set(config_lib.flatten(config_lib.load_recipe(name)))
    except ValueError as error:
        problems.append(f"cannot load the recipe {name}: {error}")
        return None


def plan_runs(args) -> dict[str, Values]:
    """Run name → its values, --set included. Raises ValueError listing every problem."""
    problems: list[str] = []
    fixed: Values = {}
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if not equals:
            problems.append(f"--set {pair!r} is not of the form key=value")
        else:
            fixed[key] = value
    points = [point for text in args.sweep for point in parse_sweep(text, problems)]

    recipes = sorted({point.get("config", args.config) or "" for point in points} - {""})
    if any("config" not in point for point in points) and not args.config:
        problems.append("--config is missing, for example --config=configs/quickstart.py")
    keys = ({key for point in points for key in point} | set(fixed)) - {"config"}
    for recipe in recipes:
        known = load_recipe(recipe, problems)
        for key in sorted(keys - known) if known else ():
            problems.append(f"{recipe} has no key {key}{config_lib.suggest(key, known)}")
    for key in sorted(keys & set(fixed) & {key for point in points for key in point}):
        problems.append(f"{key} is both swept and in --set")

    runs: dict[str, Values] = {}
    for point in points:
        name = run_name(point)
        if name in runs:
            problems.append(f"two runs are called {name}")
        runs[name] = {"config": args.config} | fixed | point
    if problems:
        raise ValueError("\n  - ".join(["nothing was started:", *dict.fromkeys(problems)]))
    return runs


def short(value: str) -> str:
    """A value fit for a file name: 'configs/quickstart.py:ce' → quickstart-ce."""
    return re.sub(r"[^\w.+-]+", "-", value.split("/")[-1].replace(".py", ""))


def run_name(point: Values) -> str:
    """A directory name: {"otreg.weight": "1", "seed": "0"} → otreg.weight-1_seed-0."""
    return "_".join(f"{key}-{short(value)}" for key, value in point.items())


# ------------------------------------------------------------------------------------- one run


def execute(command: list[str], log: Path) -> int:
    """Runs a command, appends what it prints to `log`, returns its exit status."""
    with log.open("a") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode


def finished(directory: Path, values: Values) -> bool:
    """Whether the run in `directory` was evaluated, and with these values."""
    mark = directory / "sweep.json"
    evaluated = rundir.of(directory).results.exists() and mark.exists()
    return evaluated and json.loads(mark.read_text()) == values


def run_one(directory: Path, values: Values, launcher: list[str]) -> str:
    """Trains and evaluates; returns "" or what went wrong. sweep.json marks a finished run."""
    directory.mkdir(parents=True, exist_ok=True)
    log = local = directory / "sweep.log"
    if rundir.is_remote(directory):  # nothing can be appended to there
        local = Path(tempfile.mkdtemp(prefix="sweep-")) / "sweep.log"
    flags = [
        f"--config={value}" if key == "config" else f"--config.{key}={value}"
        for key, value in values.items()
    ]
    train = [*launcher, *flags, f"--workdir={directory}"]
    evaluate = [sys.executable, "-m", "otreg_jax.evaluate", f"--workdir={directory}"]
    (directory / "sweep.json").unlink(missing_ok=True)
    for what, arguments in (("training", train), ("evaluation", evaluate)):
        status = execute(arguments, local)
        if local is not log:
            log.write_bytes(local.read_bytes())
        if status == 75:
            return f"{what} was interrupted; the same command resumes it"
        if status:
            last = local.read_text().strip().splitlines()[-1]
            return f"{what} failed with exit status {status}: {last} (all of it: {log})"
    results = rundir.of(directory).results
    if not results.exists():
        return f"evaluation wrote no {results} (see {log})"
    (directory / "sweep.json").write_text(json.dumps(values))
    return ""


# ------------------------------------------------------------------------------------- results


def measure(sets: dict[str, dict], metric: str) -> dict[str, float]:
    """Column → value: every set, then the means over in-domain and other sets if several."""
    columns = {}
    for name, figures in sets.items():
        value = figures
        for part in metric.split("."):
            if part not in value:
                known = ", ".join(value)
                raise ValueError(f"--metric {metric}: set {name} has no {part!r}, only {known}")
            value = value[part]
        columns[name] = 100 * value if is_rate(metric) else value
    for label, in_domain in (("in-domain mean", True), ("out-of-domain mean", False)):
        members = [columns[name] for name in sets if sets[name].get("in_domain") is in_domain]
        if len(members) > 1:
            columns[label] = statistics.fmean(members)
    return columns


def is_rate(metric: str) -> bool:
    """Error rates are shown in percent."""
    return metric.split(".")[-1].startswith(("wer", "cer"))


def group(results: list[dict], axes: list[str]) -> dict[tuple[str, ...], dict[str, list[float]]]:
    """Values on the axes → column → its numbers, one for each seed."""
    rows: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for result in results:
        row = rows.setdefault(tuple(result["values"].get(axis, "") for axis in axes), {})
        for column, number in result["columns"].items():
            row.setdefault(column, []).append(number)
    return rows


def mean_and_spread(numbers: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; that of a single number is nan."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return statistics.fmean(numbers), spread


def table(rows: dict[tuple[str, ...], dict[str, list[float]]], axes: list[str], label: str) -> str:
    """Markdown, a row for every combination of the axes."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[*axes, "runs", *columns], ["---"] * (len(axes) + 1 + len(columns))]
    for point, row in rows.items():
        cells = []
        for column in columns:
            mean, spread = mean_and_spread(row[column]) if column in row else (math.nan, math.nan)
            cells.append(f"{mean:.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}"))
        lines.append([*point, str(max(map(len, row.values()))), *cells])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{label}, mean ± sample standard deviation over seeds\n\n{body}\n"


def plot(
    rows: dict[tuple[str, ...], dict[str, list[float]]], axes: list[str], label: str, path: Path
) -> None:
    """A panel a column: the axis with most values along x, a line for each value of the others.
    Large dots and bars are mean ± sample standard deviation, small dots single runs."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    values = [list(dict.fromkeys(point[i] for point in rows)) for i in range(len(axes))]
    along = max(range(len(axes)), key=lambda i: len(values[i]))
    rest = lambda point: point[:along] + point[along + 1 :]
    lines = list(dict.fromkeys(rest(point) for point in rows))

    across = min(len(columns), 3)
    down = -(-len(columns) // across)
    figure = Figure(figsize=(3.6 * across, 3.0 * down + 0.6), layout="constrained")
    for panel, column in enumerate(columns, 1):
        ax = figure.add_subplot(down, across, panel)
        for number, line in enumerate(lines):
            color, shift = f"C{number}", 0.08 * (number - (len(lines) - 1) / 2)
            points = [point for point in rows if rest(point) == line and column in rows[point]]
            xs = [values[along].index(point[along]) + shift for point in points]
            for x, point in zip(xs, points, strict=True):
                numbers = rows[point][column]
                ax.plot([x] * len(numbers), numbers, ".", color=color, alpha=0.4)
            means = [mean_and_spread(rows[point][column]) for point in points]
            name = ", ".join(
                f"{a}={short(v)}" for a, v in zip(rest(tuple(axes)), line, strict=True)
            )
            bars = [0 if math.isnan(spread) else spread for _, spread in means]
            ax.errorbar(
                xs, [m for m, _ in means], bars, marker="o", capsize=3, color=color, label=name
            )
        ticks = [short(value) for value in values[along]]
        rotation = 20 if max(map(len, ticks)) > 8 else 0
        ax.set_xticks(range(len(ticks)), ticks, rotation=rotation)
        ax.set_xlim(-0.5, len(ticks) - 0.5)
        ax.set(title=column, xlabel=axes[along])
        ax.grid(axis="y", alpha=0.3)
    figure.supylabel(label)
    if len(lines) > 1:
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 3))
    with path.open("wb") as file:
        figure.savefig(file, dpi=120, format="png")


def write_results(workdir: Path, runs: dict[str, Values], metric: str) -> str:
    """Writes results.jsonl, table.md and plot.png of the finished runs; returns the table."""
    results = []
    for name, values in runs.items():
        if finished(workdir / name, values):
            sets = rundir.read_json(rundir.of(workdir / name).results, "delete it")["sets"]
            columns = measure(sets, metric)
            results.append({"run": name, "values": values, "columns": columns, "sets": sets})
    if not results:
        return "no run has finished\n"
    keys = dict.fromkeys(key for values in runs.values() for key in values if key != "seed")
    axes = [key for key in keys if len({values.get(key) for values in runs.values()}) > 1]
    axes = axes or ["config"]
    label = f"{metric} (%)" if is_rate(metric) else metric
    rows = group(results, axes)
    text = table(rows, axes, label)
    lines = (json.dumps(result) + "\n" for result in results)
    (workdir / "results.jsonl").write_text("".join(lines))
    (workdir / "table.md").write_text(text)
    plot(rows, axes, label, workdir / "plot.png")
    return text


def main(values, _) -> int:
    """Returns the exit status: 0, or 1 if a run failed."""
    try:
        return sweep(plan_runs(values), values)
    except ValueError as error:
        sys.exit(f"sweep: {error}")
    except KeyboardInterrupt:
        sys.exit("sweep: interrupted; the same command goes on from here")


def sweep(runs: dict[str, Values], args) -> int:
    """Runs what is not finished; returns the exit status."""
    recipe = Path(next(iter(runs.values()))["config"].partition(":")[0])
    workdir = epath.Path(args.workdir or f"runs/sweep-{recipe.stem}")
    todo = {name: v for name, v in runs.items() if not finished(workdir / name, v)}
    print(f"sweep: {len(runs)} runs in {workdir}, {len(runs) - len(todo)} finished before")

    failures = {}
    begin = time.monotonic()
    launcher = shlex.split(args.launcher) or [sys.executable, "-m", "otreg_jax.train"]
    with ThreadPoolExecutor(max(args.jobs, 1)) as pool:
        names = {
            pool.submit(run_one, workdir / name, values, launcher): name
            for name, values in todo.items()
        }
        try:
            for count, future in enumerate(as_completed(names), 1):
                name, problem = names[future], future.result()
                if problem:
                    failures[name] = problem
                minutes = (time.monotonic() - begin) / 60
                progress = f"[{count}/{len(todo)}, {minutes:.1f} min]"
                print(f"{progress} {name}: {problem or 'done'}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise

    print("\n" + write_results(workdir, runs, args.metric))
    if failures:
        print(f"{len(failures)} of {len(runs)} runs failed; the same command repeats them:")
        for name, problem in failures.items():
            print(f"  - {name}: {problem}")
    return 1 if failures else 0


cli = functools.partial(command.run, main, define_flags, required=["sweep"])

if __name__ == "__main__":
    sys.exit(cli())
