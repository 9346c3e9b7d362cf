"""The report of the study: tables, claims and figures, all computed from the lines of its runs."""

import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study_questions import (
    COURSE_RESULTS,
    COURSES,
    QUESTIONS,
    RECIPE,
    ROOT,
    SHIFTS,
    Question,
    read_results,
)
from benchmarks.tables import markdown

PAGE, README = ROOT / "docs" / "study.md", ROOT / "README.md"
BEGIN, END = "<!-- python -m benchmarks.study --report -->", "<!-- end of report -->"
ENOUGH = 3  # seeds below which nothing is claimed: resampling so few says little of the spread
COST = (
    "The fastest stretch of an arm's runs, on one of two cores whose other one was busy: read no "
    "difference below a quarter into it. [performance.md](performance.md) has the share of the "
    "step that was measured on its own."
)
COURSE = (
    "How much of the plan (similarity alone, after the first LLM layer) lies on the word that is "
    "spoken at the time, on `dev`, while the adapter learns."
)
# (arm, reference): the differences that answer a question.
PAIRS = (
    ("paper", "ce"),
    ("layer0_prior", "ce"),
    ("layer0_prior", "position0"),
    ("layer1_prior", "ce"),
    ("layer1_prior", "position1"),
    ("layer1_prior", "ctc"),
    ("ctc", "ce"),
    ("layer1_prior_ctc", "ce"),
    ("layer1_prior_ctc", "ctc"),
    ("layer1_prior_ctc", "position1_ctc"),
    ("layer1_faint_ctc", "ce"),
    ("layer1_faint_ctc", "ctc"),
    ("layer1_relaxed_ctc", "ce"),
    ("layer1_relaxed_ctc", "ctc"),
    ("layer1_relaxed_ctc", "position1_ctc"),
    ("layer1_relaxed_faint_ctc", "ce"),
    ("layer1_relaxed_faint_ctc", "ctc"),
)
# What README shows: (world, arm, reference).
HEADLINE = (
    ("trimmed", "layer1_prior", "ce"),
    ("trimmed", "layer1_prior", "position1"),
    ("trimmed", "ctc", "ce"),
    ("trimmed", "layer1_prior_ctc", "ctc"),
    ("trimmed", "layer1_faint_ctc", "ce"),
    ("trimmed", "layer1_faint_ctc", "ctc"),
    ("untrimmed", "layer1_relaxed_ctc", "position1_ctc"),
    ("untrimmed", "layer1_relaxed_faint_ctc", "ce"),
    ("untrimmed", "layer1_relaxed_faint_ctc", "ctc"),
)


class Difference(NamedTuple):
    """Arm minus reference, in points of the error rate (negative is better)."""

    mean: float
    low: float  # 95 % interval
    high: float
    wins: int  # seeds in which the arm made fewer errors
    seeds: int

    @property
    def carried(self) -> bool:
        return self.seeds >= ENOUGH and not self.low <= 0 <= self.high


def errors_and_lengths(line: dict, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and words (or characters) of every sentence, summed over sets that speak the same
    sentences in the same order."""
    of = lambda key: np.sum([line["sets"][name][key] for name in names], axis=0)
    return of("errors"), of("lengths")


def error_rate(line: dict, names: tuple[str, ...]) -> float:
    """Percent, pooled over sets."""
    errors, lengths = errors_and_lengths(line, names)
    return 100 * errors.sum() / lengths.sum()


def compare(ours: dict[int, dict], theirs: dict[int, dict], names) -> Difference | None:
    """Over the seeds that both arms have; None without any."""
    return compare_worlds([(ours, theirs, names)])


def compare_worlds(worlds: list[tuple]) -> Difference | None:
    """The mean over worlds, each with what `compare` takes; None unless every one has a seed that
    both arms have.

    The interval is a paired bootstrap over the seeds and sentences of each world, drawn
    for each on its own: the seeds of two worlds have nothing in common.
    """
    found = [bootstrap(*world, rng_seed=i) for i, world in enumerate(worlds)]
    if not found or None in found:
        return None
    means, wins, seeds, draws = zip(*found, strict=True)
    low, high = np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
    return Difference(statistics.fmean(means), float(low), float(high), sum(wins), sum(seeds))


def bootstrap(ours: dict[int, dict], theirs: dict[int, dict], names, rng_seed: int) -> tuple | None:
    """(mean, seeds in which ours made fewer errors, seeds, 2000 drawn means), or None.

    Seeds and sentences are drawn with replacement, and a sentence brings its errors in all sets and
    under all the drawn seeds with it.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    length_U = errors_and_lengths(ours[seeds[0]], names)[1]
    errors = lambda runs: np.stack([errors_and_lengths(runs[seed], names)[0] for seed in seeds])
    difference_NU = 100.0 * (errors(ours) - errors(theirs))
    rng = np.random.default_rng(rng_seed)
    drawn = []
    for _ in range(2000):
        rows = rng.integers(len(seeds), size=len(seeds))
        columns = rng.integers(len(length_U), size=len(length_U))
        drawn.append(difference_NU[rows][:, columns].mean(axis=0).sum() / length_U[columns].sum())
    wins = int((difference_NU.sum(axis=1) < 0).sum())
    mean = difference_NU.mean(axis=0).sum() / length_U.sum()
    return float(mean), wins, len(seeds), drawn


def arms_of(results: list[dict], question: Question) -> dict[str, dict[int, dict]]:
    """arm → seed → its line, in the order of the question; arms without a run are left out."""
    found = {
        arm: {r["seed"]: r for r in results if r["run"] in runs_of(question, arm)}
        for arm in question.arms
    }
    return {arm: runs for arm, runs in found.items() if runs}


def runs_of(question: Question, arm: str) -> set[str]:
    return {f"{question.world},{arm},{seed}" for seed in question.seeds}


def spread(numbers) -> str:
    """mean ± sample standard deviation, of a single number itself."""
    numbers = list(numbers)
    deviation = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.1f}{deviation}"


def runaway(line: dict, names) -> float:
    """The share of sentences with more than 1.2 errors for every character (or word) of them."""
    sets = [line["sets"][name] for name in names]
    of = lambda key: np.concatenate([one[key] for one in sets])
    return float(np.mean(of("errors") > 1.2 * of("lengths")))


def error_table(arms: dict[str, dict[int, dict]], shifts) -> str:
    names = [name for members in shifts.values() for name in members]
    synthetic = shifts is SHIFTS
    rows = [["arm", "seeds", *names, *(["templates", "mass"] if synthetic else ["runaway"])]]
    for arm, runs in arms.items():
        lines = list(runs.values())
        cells = [spread(error_rate(line, (name,)) for line in lines) for name in names]
        if synthetic:
            made_up = [
                100 * statistics.fmean(line["sets"][n]["hallucinated"] for n in shifts["new text"])
                for line in lines
            ]
            mass = statistics.fmean(line["spoken_mass"] for line in lines)
            cells += [spread(made_up), f"{mass:.2f}"]
        else:
            cells.append(spread(100 * runaway(line, names) for line in lines))
        rows.append([arm, str(len(lines)), *cells])
    return markdown(rows[0], rows[1:])


def difference_table(arms, shifts) -> str:
    rows = [["arm − reference", *shifts]]
    for arm, reference in PAIRS:
        if arm in arms and reference in arms:
            found = [compare(arms[arm], arms[reference], n) for n in shifts.values()]
            rows.append([f"{arm} − {reference}", *(cell(d) for d in found)])
    return markdown(rows[0], rows[1:]) if len(rows) > 1 else ""


def cell(d: Difference | None) -> str:
    """-3.1 [-4.0, -2.2] 5/5, bold where the interval leaves out 0."""
    if d is None:
        return ""
    if d.seeds == 1:
        return f"{d.mean:+.1f}"
    shown = f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}] {d.wins}/{d.seeds}"
    return f"**{shown}**" if d.carried else shown


def sentence(arm: str, reference: str, shift: str, d: Difference) -> str:
    if not d.carried:
        return f"not significantly different from {reference} on {shift} (95 %)"
    verb = "fewer" if d.mean < 0 else "more"
    return f"{abs(d.mean):.1f} points {verb} errors than {reference} on {shift}"


def summary(arms, shifts) -> list[str]:
    """The arm of fewest errors for every kind of shift, and a plain-language line a pair."""
    repeated = {arm: runs for arm, runs in arms.items() if len(runs) >= ENOUGH}
    repeated.pop("untrained", None)
    if len(repeated) < 2:
        return [f"- Too few seeds to tell arms apart: no claim is made with less than {ENOUGH}."]
    lines = []
    for shift, names in shifts.items():
        means = {
            arm: statistics.fmean(error_rate(line, names) for line in runs.values())
            for arm, runs in repeated.items()
        }
        best = min(means, key=means.get)
        lines.append(f"- Fewest errors on {shift}: {best} ({means[best]:.1f} %).")
    for arm, reference in PAIRS:
        if arm in arms and reference in arms:
            found = {s: compare(arms[arm], arms[reference], n) for s, n in shifts.items()}
            told = [
                sentence(arm, reference, s, d) for s, d in found.items() if d and d.seeds >= ENOUGH
            ]
            if told:
                lines.append(f"- **{arm}**: " + "; ".join(told) + ".")
    return lines


def step_time_table(results: list[dict]) -> str:
    """The fastest stretch of an arm's runs over that of ce's, the median over processes; "" unless
    there are runs enough for each arm to have had a quiet stretch."""
    results = [r for r in results if r["world"] == "trimmed"]
    ratios: dict[str, list[float]] = {}
    for process in sorted({r["process"] for r in results}):
        fastest: dict[str, float] = {}
        for r in results:
            if r["process"] == process and r["step_seconds"]:
                fastest[r["arm"]] = min(r["step_seconds"], fastest.get(r["arm"], np.inf))
        if "ce" in fastest:
            for arm, seconds in fastest.items():
                ratios.setdefault(arm, []).append(seconds / fastest["ce"])
    runs = [r["arm"] for r in results]
    rows = [["arm", "step time / that of ce", "processes"]]
    for arm in RECIPE["ARMS"]:
        if arm in ratios and min(runs.count(arm), runs.count("ce")) >= ENOUGH:
            rows.append([arm, f"{statistics.median(ratios[arm]):.2f}", str(len(ratios[arm]))])
    return markdown(rows[0], rows[1:]) if len(rows) > 1 else ""


def course_table(courses: list[dict], question: Question) -> str:
    """The mass on the spoken word by step, means over the seeds that are there."""
    steps = sorted({line["step"] for line in courses})
    rows = []
    for arm in question.arms:
        found = [line for line in courses if line["run"] in runs_of(question, arm)]
        if found:
            at = [[c["spoken_mass"] for c in found if c["step"] == step] for step in steps]
            rows.append([arm, str(len(at[0])), *(f"{statistics.fmean(mass):.2f}" for mass in at)])
    header = [f"{question.world}: mass at step", "seeds", *map(str, steps)]
    return markdown(header, rows) if rows else ""


def course_figure(courses: list[dict], path: Path) -> None:
    """A panel a world: the mass on the spoken word against the step, a line a run."""
    fig = Figure(figsize=(10, 3.6), layout="constrained")
    panels = fig.subplots(1, len(COURSES), sharey=True)
    for ax, question in zip(panels, COURSES, strict=True):
        for i, arm in enumerate(question.arms):
            for seed, name in zip(question.seeds, sorted(runs_of(question, arm)), strict=True):
                found = [c for c in courses if c["run"] == name]
                ax.plot(
                    [c["step"] for c in found],
                    [c["spoken_mass"] for c in found],
                    f"C{i}.-",
                    label=arm if seed == question.seeds[0] else None,
                    alpha=0.7,
                )
        ax.set(title=question.world, xlabel="step", ylim=(0, 1))
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    fig.axes[0].set_ylabel("plan mass on the spoken word")
    fig.savefig(path, dpi=90)


def figure(arms, question: Question, path: Path) -> None:
    """A panel a kind of shift, a row an arm: dots are runs, bars mean ± standard deviation."""
    shifts = question.shifts
    shown = [arm for arm in arms if arm != "untrained"]
    fig = Figure(figsize=(10, 0.9 + 0.26 * len(shown)), layout="constrained")
    for ax, shift in zip(fig.subplots(1, len(shifts), sharey=True), shifts, strict=True):
        for y, arm in enumerate(shown):
            values = [error_rate(line, shifts[shift]) for line in arms[arm].values()]
            deviation = statistics.stdev(values) if len(values) > 1 else 0
            ax.plot(values, [y] * len(values), ".", color="0.6")
            ax.errorbar(statistics.fmean(values), y, xerr=deviation, fmt="o", capsize=3, color="C0")
        ax.set(title=shift, xlabel="errors (%)", yticks=range(len(shown)), yticklabels=shown)
        ax.grid(axis="x", alpha=0.3)
    fig.axes[0].set_ylim(len(shown) - 0.5, -0.5)
    fig.suptitle(question.title)
    fig.savefig(path, dpi=90)


def report(results: list[dict], courses: list[dict], folder: Path) -> str:
    """The generated part of docs/study.md; figures go to `folder`."""
    parts = []
    for question in QUESTIONS:
        arms = arms_of(results, question)
        if not arms:
            parts += [f"## {question.title}", "Not run."]
            continue
        name = "study-" + question.world.replace("+", "-")
        figure(arms, question, folder / f"{name}.png")
        missing = len(set(question.runs()) - {r["run"] for r in results})
        note = f"; {missing} of {len(question.runs())} runs were not made" if missing else ""
        parts += [
            f"## {question.title}",
            f"`{question.world}`, seeds {', '.join(map(str, question.seeds))}{note}.",
            "\n".join(summary(arms, question.shifts)),
            f"![{question.title}]({name}.png)",
            error_table(arms, question.shifts),
            difference_table(arms, question.shifts),
        ]
    if courses:
        course_figure(courses, folder / "study-courses.png")
        parts += [
            "## Where the plans lie during training",
            COURSE,
            "![Plan mass on the spoken word](study-courses.png)",
            *(course_table(courses, question) for question in COURSES),
        ]
    if times := step_time_table(results):
        hours = sum(sum(r["seconds"]) for r in results) / 3600
        took = f"The {len(results)} runs took {hours:.1f} hours, each on one core."
        parts += ["## What it costs", took, COST, times]
    return "\n\n".join(part for part in parts if part)


def headline(results: list[dict]) -> str:
    """The table of README."""
    arms = {q.world: arms_of(results, q) for q in QUESTIONS}
    rows = []
    for world, arm, reference in HEADLINE:
        ours, theirs = (arms[world].get(name, {}) for name in (arm, reference))
        cells = [cell(compare(ours, theirs, names)) for names in SHIFTS.values()]
        rows.append([f"{arm} − {reference}, {world}", *cells])
    return markdown(["errors in points of WER", *SHIFTS], rows)


def write_pages(results: list[dict]) -> None:
    page = report(results, read_results(COURSE_RESULTS), PAGE.parent)
    for path, generated in ((PAGE, page), (README, headline(results))):
        path.write_text(with_generated(path.read_text(), generated))


def with_generated(page: str, generated: str) -> str:
    """The page with what stands between its two marks replaced."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{rest.partition(END)[2]}"
