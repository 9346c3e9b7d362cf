"""What the study on real parts asks, and its report: all figures from the lines of its runs."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study_questions import ROOT
from benchmarks.study_report import ENOUGH, cell, compare_worlds, spread
from benchmarks.tables import markdown

RESULTS = ROOT / "benchmarks" / "results" / "study_real.jsonl"
PAGE = ROOT / "docs" / "study.md"
BEGIN, END = "<!-- python -m benchmarks.study_real --report -->", "<!-- end of real parts -->"
LEVELS = (0.8, 0.6, 0.5, 0.4, 0.3)  # error rates whose price is asked for
GAPS = (
    "retrieval_accuracy",
    "monotonicity",
    "centroid_distance",
    "nearest_cosine",
    "transport_cost",
)
# What the test sets "corpus-noise" and "corpus-reverb" are, as `synthetic.worsen` takes it.
ROUGH = {"noise": {"snr": 10.0}, "reverb": {"reverb": 0.4}}
MASS = "spoken_mass"  # of the gap measures, that of `alignment.measure` which word times allow
NOISY = "noise, echoes"  # the kind of shift that these are
UNSEEN = "other corpora"
RUNAWAY = 1.2  # errors a word: the output runs away
CORRELATED = 5  # runs below which no correlation is shown


class Question(NamedTuple):
    """Arms compared in some worlds; seeds: {size: how many, from 1 on}."""

    title: str
    worlds: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: dict[str, int]

    def runs(self, size: str) -> list[str]:
        """All arms of a seed before the next."""
        return [
            f"{world},{arm},{seed + 1}"
            for seed in range(self.seeds.get(size, 0))
            for world in self.worlds
            for arm in self.arms
        ]


MAIN = ("otreg0/ce", "ctc/ce", "ctc+otreg0/ce", "ctc+position0/ce", "skip/ce")
ALIGNED = (  # beside CTC, and without it
    "ctc+otreg1/ce",
    "ctc+layers01/ce",
    "ctc+faint0/ce",
    "ctc+collapsed0/ce",
    "ctc+relaxed0/ce",
    "ctc+window0/ce",
    "ctc+gaussian0/ce",
    "ctc+structure0/ce",
    "otreg1/ce",
    "position0/ce",
)
AFTER = ("ctc/ce+otreg0", "ctc/ce+otreg1", "ctc/ce+ctc", "ctc/ce+kl", "ctc/kl")
ALONE = ("skip/ce+otreg1", "skip/ce+ctc", "skip/kl", "none/ce")
FORMS = (*ALIGNED, *AFTER, *ALONE)
# In the order they are run.
QUESTIONS = (
    Question("What aligning first is worth", ("read",), MAIN, {"short": 1, "cpu": 1, "gpu": 5}),
    Question("Other worlds", ("talk", "all"), MAIN, {"short": 1, "cpu": 1, "gpu": 5}),
    Question("Which form of OTReg", ("read",), FORMS, {"short": 1, "cpu": 1, "gpu": 5}),
    Question("Seeds", ("read", "talk"), MAIN, {"short": 3, "cpu": 3, "gpu": 5}),
    Question("Forms in other worlds", ("talk", "all"), FORMS, {"gpu": 5}),
)
# (arm, reference): the differences that answer a question.
PAIRS = (
    *((arm, alone) for alone in ("skip/ce", "none/ce") for arm in (*MAIN[:3], AFTER[0])),
    ("otreg0/ce", "ctc/ce"),
    ("otreg0/ce", "position0/ce"),
    ("ctc+otreg0/ce", "ctc/ce"),
    ("ctc+otreg0/ce", "ctc+position0/ce"),
    *((arm, "ctc/ce") for arm in FORMS if arm.startswith("ctc")),
    *((arm, "skip/ce") for arm in ALONE if arm.startswith("skip")),
)


def shifts(lines: Iterable[dict]) -> dict[str, tuple[str, ...]]:
    """Test sets of a world's runs by kind of shift: those of corpora trained on, every other one
    by its name, and all in noise or echoes."""
    found = {"in-domain": ()}
    for line in lines:
        for name in line["sets"]:
            rough = name.rpartition("-")[2] in ROUGH
            kind = NOISY if rough else "in-domain" if name in trained_on(line) else name
            if name not in found.get(kind, ()):
                found[kind] = (*found.get(kind, ()), name)
    rough = found.pop(NOISY, ())
    return {kind: names for kind, names in (found | {NOISY: rough}).items() if names}


def corpora(line: dict) -> list[str]:
    """Every corpus has a dev set, which the course is measured on; further test sets have none."""
    return list(line["course"][-1]["sets"])


def trained_on(line: dict) -> list[str]:
    return [name for name in corpora(line) if line["world"] in (name, "all")]


def unseen(line: dict) -> list[str]:
    return [name for name in corpora(line) if name not in trained_on(line)]


def of_sets(lines: Iterable[dict], names) -> list[dict]:
    """The lines that were tested on all of these sets: some came with later runs."""
    return [line for line in lines if set(names) <= line["sets"].keys()]


def pooled(line: dict, names) -> dict:
    """The line with these sets as one, "pool"."""
    join = lambda key: [x for name in names for x in line["sets"][name][key]]
    return {"sets": {"pool": {"errors": join("errors"), "lengths": join("lengths")}}}


def error_rate(line: dict, names) -> float:
    """Percent, pooled over sets."""
    pool = pooled(line, names)["sets"]["pool"]
    return 100 * sum(pool["errors"]) / sum(pool["lengths"])


def runaway(line: dict) -> float:
    """Percent of the corpora's test utterances whose output has over RUNAWAY errors a word."""
    pool = pooled(line, corpora(line))["sets"]["pool"]
    return 100 * float(np.mean(np.array(pool["errors"]) > RUNAWAY * np.array(pool["lengths"])))


def timed_sets(lines: Iterable[dict]) -> list[str]:
    """The sets whose words have times in every line that has such sets."""
    found = [{n for n, x in line["sets"].items() if MASS in x.get("gap", {})} for line in lines]
    return sorted(set.intersection(*filter(None, found))) if any(found) else []


def spoken_mass(line: dict, names) -> float:
    """Percent of the plan that lies on the word spoken at the time, the mean of these sets."""
    return 100 * statistics.fmean(line["sets"][name]["gap"][MASS] for name in names)


def by_arm(lines: list[dict]) -> dict[str, dict[int, dict]]:
    """arm -> seed -> its line, in the order of the questions."""
    order = dict.fromkeys(arm for question in QUESTIONS for arm in question.arms)
    found = {arm: {x["seed"]: x for x in lines if x["arm"] == arm} for arm in order}
    others = {x["arm"] for x in lines} - order.keys()
    found |= {arm: {x["seed"]: x for x in lines if x["arm"] == arm} for arm in sorted(others)}
    return {arm: seeds for arm, seeds in found.items() if seeds}


def watched(line: dict, point: dict) -> float:
    """The error rate of a point of the course: on dev sets not trained on, if there are any."""
    rates = point["sets"]
    names = unseen(line) or list(rates)
    return statistics.fmean(rates[name]["wer"] for name in names)


def reached(line: dict, level: float) -> tuple[int, float] | None:
    """(step, minutes) of the first point of the course at or below a level; None: never."""
    for point in line["course"]:
        if watched(line, point) <= level:
            return point["step"], point["minutes"]
    return None


def at_minutes(line: dict, minutes: float) -> float | None:
    """The error rate of the course so late, between the points on a straight line; None before the
    first and after the last."""
    times = [point["minutes"] for point in line["course"]]
    if not times or not times[0] <= minutes <= times[-1] + 1e-9:
        return None
    return float(np.interp(minutes, times, [watched(line, point) for point in line["course"]]))


def clock(lines: Iterable[dict]) -> tuple[str, float]:
    """The unit that times are shown in, and how many of it a minute has: a GPU needs seconds."""
    return ("seconds", 60.0) if max(line["minutes"] for line in lines) < 2 else ("minutes", 1.0)


def runs_of(arms: dict[str, dict[int, dict]]) -> list[dict]:
    return [line for seeds in arms.values() for line in seeds.values()]


def error_table(arms: dict[str, dict[int, dict]]) -> str:
    names = [name for kind in shifts(runs_of(arms)).values() for name in kind]
    timed = timed_sets(runs_of(arms))
    mass = [f"plan mass ({', '.join(timed)})"] if timed else []
    unit, each = clock(runs_of(arms))
    header = ["align / SFT", "seeds", *names, "runaway", *mass, unit]
    rows = []
    for arm, seeds in arms.items():
        lines = list(seeds.values())
        of = {name: of_sets(lines, (name,)) for name in names}
        cells = [spread(error_rate(x, (n,)) for x in of[n]) if of[n] else "–" for n in names]
        cells.append(spread(map(runaway, lines)))
        if timed:
            masses = [spoken_mass(x, timed) for x in lines if timed_sets([x])]
            cells.append(spread(masses) if masses else "–")
        cells.append(spread(each * line["minutes"] for line in lines))
        rows.append([arm, str(len(lines)), *cells])
    return markdown(header, rows)


def difference_table(arms) -> str:
    """Points of WER, the paired interval over seeds and utterances, and the change of the rate."""
    columns = shifts(runs_of(arms))
    rows = []
    for arm, reference in dict.fromkeys(PAIRS):
        if arm in arms and reference in arms:
            cells = [difference([(arms[arm], arms[reference], n)]) for n in columns.values()]
            rows.append([f"{arm} − {reference}", *cells])
    return markdown(["points of WER", *columns], rows) if rows else ""


def overall_table(worlds: dict[str, dict]) -> str:
    """The same as the mean over worlds, where two or more have enough seeds of both arms."""
    kinds = {world: overall_shifts(runs_of(arms)) for world, arms in worlds.items()}
    columns = list(dict.fromkeys(kind for found in kinds.values() for kind in found))
    rows = []
    for arm, reference in dict.fromkeys(PAIRS):
        having = [w for w, arms in worlds.items() if arm in arms and reference in arms]
        found = lambda kind, having=having, arm=arm, reference=reference: [
            (worlds[w][arm], worlds[w][reference], kinds[w][kind])
            for w in having
            if kind in kinds[w]
        ]
        cells = [difference(found(kind), min_worlds=2, min_seeds=ENOUGH) for kind in columns]
        rows.append([f"{arm} − {reference}", *cells])
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    filled = [i for i in range(len(columns) + 1) if any(row[i] != "–" for row in rows)]
    table = [[row[i] for i in filled] for row in (["points of WER", *columns], *rows)]
    return markdown(table[0], table[1:]) if rows else ""


def overall_shifts(lines: list[dict]) -> dict[str, tuple[str, ...]]:
    """What `shifts` finds, with the corpora that were not trained on as one kind."""
    found = shifts(lines)
    other = tuple(name for name in found if name in unseen(lines[0]))
    kinds = {kind: names for kind, names in found.items() if kind not in other}
    first = {"in-domain": kinds.pop("in-domain"), UNSEEN: other}
    return {kind: names for kind, names in (first | kinds).items() if names}


def difference(worlds: list[tuple], min_worlds: int = 1, min_seeds: int = 1) -> str:
    """What a table says of [({seed: line}, {seed: line} of the reference, sets), ...]: of those in
    which so many seeds of both were tested on the sets. Of one seed, the interval is over
    utterances alone."""
    pairs, before = [], []
    for mine, theirs, names in worlds:
        ours, others = ({x["seed"]: x for x in of_sets(m.values(), names)} for m in (mine, theirs))
        if len(seeds := ours.keys() & others.keys()) >= min_seeds:
            pool = lambda found, names=names: {s: pooled(x, names) for s, x in found.items()}
            pairs.append((pool(ours), pool(others), ("pool",)))
            before.append(statistics.fmean(error_rate(others[seed], names) for seed in seeds))
    if len(pairs) < min_worlds:
        return "–"
    found = compare_worlds(pairs)
    few = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}] 1 seed"
    shown = cell(found) if found.seeds > 1 else few
    return f"{shown} ({100 * found.mean / statistics.fmean(before):+.0f} %)"


def price_table(arms) -> str:
    """Steps and time until the course is at an error rate, the median over seeds."""
    lines = runs_of(arms)
    shared, (unit, each) = min(line["minutes"] for line in lines), clock(lines)
    levels = [f"{100 * x:.0f} %" for x in LEVELS]
    header = [f"align / SFT: steps ({unit})", *levels, f"WER at {each * shared:.1f} {unit}"]
    rows = []
    for arm, seeds in arms.items():
        cells = []
        for level in LEVELS:
            found = [reached(line, level) for line in seeds.values()]
            if None in found:
                cells.append("–")
            else:
                step, minutes = (statistics.median(x) for x in zip(*found, strict=True))
                cells.append(f"{step:.0f} ({each * minutes:.1f})")
        rates = [x for line in seeds.values() if (x := at_minutes(line, shared)) is not None]
        cells.append(spread(100 * x for x in rates) if rates else "–")
        rows.append([arm, *cells])
    return markdown(header, rows)


def correlation_table(lines: list[dict]) -> str:
    """Spearman's rank correlation, over runs, of each gap measure with the WER on corpora that were
    not trained on: measured when SFT begins, and at the end."""
    lines = [x for x in lines if unseen(x) and x["steps"][0]]
    if len(lines) < CORRELATED:
        return ""
    rates = [error_rate(x, unseen(x)) for x in lines]
    rows = []
    for gap in GAPS:
        cells = []
        for point in (0, -1):
            value = lambda x, p=point, g=gap: statistics.fmean(
                found["gap"][g] for found in x["course"][p]["sets"].values()
            )
            cells.append(f"{rank_correlation([value(x) for x in lines], rates):+.2f}")
        rows.append([gap, *cells])
    return markdown(["gap measure", "when SFT begins", "at the end"], rows)


def rank_correlation(x, y) -> float:
    """Spearman's; equal values share the mean of their ranks. 0 where one side does not vary."""
    ranks = []
    for values in (np.asarray(x), np.asarray(y)):
        below = (values[:, None] > values).sum(axis=1)
        equal = (values[:, None] == values).sum(axis=1)
        ranks.append(below + (equal - 1) / 2)
    if min(np.ptp(r) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def figure(worlds: dict[str, dict], path: Path) -> None:
    """A panel a world: the course of the errors against time, a line a run, a colour an arm."""
    names, shown = list(dict.fromkeys(arm for arms in worlds.values() for arm in arms)), {}
    unit, each = clock(line for arms in worlds.values() for line in runs_of(arms))
    fig = Figure(figsize=(5 * len(worlds), 4), layout="constrained")
    for ax, (world, arms) in zip(
        fig.subplots(1, len(worlds), squeeze=False)[0], worlds.items(), strict=True
    ):
        for arm, seeds in arms.items():
            i = names.index(arm)
            for line in seeds.values():
                times = [each * p["minutes"] for p in line["course"]]
                rates = [100 * min(watched(line, p), 1.5) for p in line["course"]]
                style = ("-o", "--s", ":^")[i // 10 % 3]
                (shown[arm],) = ax.plot(times, rates, style, color=f"C{i % 10}", ms=3)
        ax.set(title=f"trained on {world}", xlabel=f"{unit}, compilation left out")
        ax.set(xlim=(0, None), ylim=(0, 150))
        ax.grid(alpha=0.3)
    fig.axes[0].set_ylabel("WER (%) on dev sets not trained on")
    fig.legend([shown[arm] for arm in names], names, fontsize="x-small", loc="outside right upper")
    fig.savefig(path, dpi=90)


def report(results: list[dict], folder: Path) -> str:
    """The generated part of docs/study.md; its figure goes to `folder`."""
    parts = []
    for size in dict.fromkeys(line["size"] for line in results):
        lines = [line for line in results if line["size"] == size]
        worlds = dict.fromkeys(line["world"] for line in results)  # all sizes in one order
        worlds = {world: by_arm([x for x in lines if x["world"] == world]) for world in worlds}
        worlds = {world: arms for world, arms in worlds.items() if arms}
        figure(worlds, folder / f"study-real-{size}.png")
        asked = {name for question in QUESTIONS for name in question.runs(size)}
        missing = len(asked - {line["run"] for line in lines})
        minutes = sum(line["minutes"] + line["test_seconds"] / 60 for line in lines)
        machine = lines[-1]["machine"]
        parts += [
            f"### `--size={size}`",
            f"{len(lines)} runs, {minutes / 60:.1f} hours; {missing} of {len(asked)} were not made."
            f" {machine['device']}, {machine['cores']} cores, jax {machine['versions']['jax']}.",
            f"![the course of the errors](study-real-{size}.png)",
        ]
        if overall := overall_table(worlds):
            parts += ["#### Over the worlds", overall]
        for world, arms in worlds.items():
            parts += [
                f"#### Trained on {world}",
                error_table(arms),
                difference_table(arms),
                "Steps and time until the dev sets that were not trained on are at this WER:",
                price_table(arms),
            ]
            if table := correlation_table([x for s in arms.values() for x in s.values()]):
                parts += ["Does the gap between speech and text foretell WER? Over runs:", table]
    return "\n\n".join(part for part in parts if part) if parts else "Not run yet."


def with_generated(page: str, generated: str) -> str:
    """The page with what stands between its two marks replaced."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{rest.partition(END)[2]}"


def write_page(results: list[dict]) -> None:
    PAGE.write_text(with_generated(PAGE.read_text(), report(results, PAGE.parent)))
