"""The study of configs/study.py: trains and evaluates every arm, then writes docs/study.md.

    python -m benchmarks.study                      # all that is missing, in the order of QUESTIONS
    python -m benchmarks.study --part=0/2           # every second run: one process a core
    python -m benchmarks.study --report             # docs/study.md and its figures, nothing trained
    python -m benchmarks.study trimmed,ce,7         # these runs only
    python -m benchmarks.study --courses            # the runs of COURSES, tested on the way
    python -m benchmarks.study --human=DIR          # recordings too: DIR/{train,dev,test}.jsonl

A run is one JSON line of benchmarks/results/study.jsonl, its course several of study_courses.jsonl;
what has its lines is not run again. Every number of docs/study.md is computed from these lines.
"""

import argparse
import importlib.metadata
import json
import os
import re
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from matplotlib.figure import Figure

from benchmarks.tables import markdown
from otreg_jax import (
    alignment,
    build,
    decoding,
    evaluate,
    metrics,
    pretrain_llm,
    pretrained,
    recognition,
    rundir,
    tracking,
    train,
)
from otreg_jax import config as config_lib
from otreg_jax.data import sets, text

ROOT = Path(__file__).parent.parent
RECIPE = runpy.run_path(str(ROOT / "configs" / "study.py"))
RESULTS = ROOT / "benchmarks" / "results" / "study.jsonl"
COURSE_RESULTS = RESULTS.with_name("study_courses.jsonl")
LAYER = 1  # where the plan of every arm is measured
PAGE, README = ROOT / "docs" / "study.md", ROOT / "README.md"
BEGIN, END = "<!-- python -m benchmarks.study --report -->", "<!-- end of report -->"

# Kinds of shift, and the test sets of each.
SHIFTS = {
    "in-domain": ("dev",),
    "other sound": ("voices", "unheard", "fast", "reverb", "noise", "silence"),
    "new text": ("domain", "domain_voices"),
}
LANGUAGES = {"English (trained on)": ("dev",), "German": ("de",), "Dutch": ("nl",)}


class Question(NamedTuple):
    """Arms compared in one world over the same seeds."""

    title: str
    world: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    shifts: dict[str, tuple[str, ...]] = SHIFTS

    def runs(self) -> list[str]:
        return [f"{self.world},{arm},{seed}" for seed in self.seeds for arm in self.arms]


ENOUGH = 3  # seeds below which nothing is claimed: resampling so few says little of the spread
FRESH = (1, 2, 3, 4, 5)  # no screening run had these
COST = (
    "The fastest stretch of an arm's runs, on one of two cores whose other one was busy: read no "
    "difference below a quarter into it. [performance.md](performance.md) has the share of the "
    "step that was measured on its own."
)
COURSE = (
    "How much of the plan (similarity alone, after the first LLM layer) lies on the word that is "
    "spoken at the time, on `dev`, while the adapter learns."
)
# In the order they are run.
QUESTIONS = (
    Question(
        "Trimmed speech, frozen LLM", "trimmed",
        (
            "ce", "ctc", "layer1_prior", "position1", "layer1_prior_ctc", "paper", "position0",
            "layer1_faint_ctc",
        ), FRESH,
    ),
    Question(
        "Untrimmed speech, frozen LLM", "untrimmed",
        ("ce", "ctc", "layer1_relaxed_ctc", "position1_ctc", "layer1_relaxed_faint_ctc"), FRESH,
    ),
    Question(
        "Screening: every arm, other voices and texts", "trimmed+screen",
        tuple(RECIPE["ARMS"]), (101, 102),
    ),
    Question(
        "Trimmed speech, LoRA", "trimmed+lora",
        ("ce", "layer1_prior", "position1", "ctc", "layer1_prior_ctc"), FRESH,
    ),
    Question(
        "Trimmed speech, the encoder learns at a tenth of the rate", "trimmed+tuned",
        ("ce", "layer1_prior", "position1", "ctc", "layer1_prior_ctc"), FRESH,
    ),
    Question(
        "Human speech, frozen LLM: characters wrong", "human",
        ("untrained", "ce", "ctc", "layer1_prior", "position1", "layer1_prior_ctc"), FRESH[:3],
        LANGUAGES,
    ),
)  # fmt: skip
# (arm, reference): the differences that answer a question.
PAIRS = (
    ("paper", "ce"), ("layer0_prior", "ce"), ("layer0_prior", "position0"),
    ("layer1_prior", "ce"), ("layer1_prior", "position1"), ("layer1_prior", "ctc"),
    ("ctc", "ce"), ("layer1_prior_ctc", "ce"), ("layer1_prior_ctc", "ctc"),
    ("layer1_prior_ctc", "position1_ctc"), ("layer1_faint_ctc", "ce"), ("layer1_faint_ctc", "ctc"),
    ("layer1_relaxed_ctc", "ce"), ("layer1_relaxed_ctc", "ctc"),
    ("layer1_relaxed_ctc", "position1_ctc"), ("layer1_relaxed_faint_ctc", "ce"),
    ("layer1_relaxed_faint_ctc", "ctc"),
)  # fmt: skip

# Arms whose plans are watched from step 0 to the end, every so many steps.
COURSES = (
    Question(
        "Trimmed speech", "trimmed",
        ("ce", "ctc", "paper", "position1", "layer1_prior", "layer1_prior_ctc"), FRESH[:3],
    ),
    Question(
        "Untrimmed speech", "untrimmed",
        ("ce", "ctc", "position1_ctc", "layer1_relaxed_ctc"), FRESH[:3],
    ),
)  # fmt: skip
COURSE_EVERY = 50

# What README shows: (world, arm, reference).
HEADLINE = (
    ("trimmed", "layer1_prior", "ce"), ("trimmed", "layer1_prior", "position1"),
    ("trimmed", "ctc", "ce"), ("trimmed", "layer1_prior_ctc", "ctc"),
    ("trimmed", "layer1_faint_ctc", "ce"), ("trimmed", "layer1_faint_ctc", "ctc"),
    ("untrimmed", "layer1_relaxed_ctc", "position1_ctc"),
    ("untrimmed", "layer1_relaxed_faint_ctc", "ce"),
    ("untrimmed", "layer1_relaxed_faint_ctc", "ctc"),
)  # fmt: skip

# ----------------------------------------------------------------------------------------- running


def train_whole(config, workdir) -> build.Run:
    """Trains and loads the run; a run that is told to stop ends the program, and goes on at the
    next call."""
    state = train.train(config, workdir)
    if int(state.step) < config.num_steps:
        sys.exit(75)
    return build.load_run(workdir)


def train_encoder(config, out: Path) -> None:
    """Saves the encoder of an SLM as Hugging Face weights, unless it is there."""
    if not (out / "config.json").exists():
        run = train_whole(config, out.with_name(f"{out.name}-run"))
        pretrained.save_speech_encoder(out, run.slm.encoder, run.params["encoder"])


def train_llm(config, sentences: list[str], out: Path, longest: int | None = None) -> None:
    """Saves an LLM taught the sentences of at most `longest` characters, all of which its tokenizer
    has seen."""
    tokenizer = text.train_sentencepiece(
        sentences, out.with_name(out.name.replace("llm", "tokenizer")),
        config.tokenizer.vocab_size, model_type=config.tokenizer.model_type,
    )  # fmt: skip
    read = [sentence for sentence in sentences if not longest or len(sentence) <= longest]
    pretrain_llm.ensure_llm(config, tokenizer, read, out)


def prepare(folder: Path) -> None:
    """Makes the pretrained parts, unless they are there: FOLDER/llm and FOLDER/encoder, saved as
    Hugging Face weights are."""
    config = RECIPE["get_config"]("encoder")
    config.data.cache = str(folder / "data")
    train_encoder(config, folder / "encoder")
    if not (folder / "llm" / "pretrain.json").exists():
        config = RECIPE["get_config"]("llm")
        sentences = sets.text_corpus(config.synthetic, config.llm.pretrain.num_sentences)
        tested = set()
        for world in ("trimmed", "trimmed+screen"):
            items = sets.synthetic_sets(RECIPE["get_config"](f"{world},ce,0").synthetic)
            tested |= {speech.text for name in items if name != "train" for speech in items[name]}
        sentences = [sentence for sentence in sentences if sentence not in tested]
        train_llm(config, sentences, folder / "llm")


def prepare_human(source: Path, folder: Path, language: str = "en", num_tested: int = 100) -> None:
    """The same for recordings: FOLDER/human-llm and FOLDER/human-encoder, and in FOLDER/human the
    manifests all (what these learn from), train (one language of it, for the adapter), dev (the
    same language) and one of each other language."""
    manifests: dict[str, list[str]] = {}
    for split in ("train", "dev", "test"):
        for line in (source / f"{split}.jsonl").read_text().splitlines():
            item = json.loads(line)
            item["audio_filepath"] = str((source / item["audio_filepath"]).resolve())
            learned = item["lang"] == language
            if split == "train":
                names = ["all", "train"] if learned else ["all"]
            else:
                names = ["dev" if learned else item["lang"]]
            for name in names:
                manifests.setdefault(name, []).append(json.dumps(item, ensure_ascii=False) + "\n")
    (folder / "human").mkdir(parents=True, exist_ok=True)
    for name, lines in manifests.items():
        every = 1 if name in ("all", "train") else max(1, len(lines) // num_tested)
        (folder / "human" / f"{name}.jsonl").write_text("".join(lines[::every]))
    config = RECIPE["get_config"]("human-encoder")
    config.data.train = str(folder / "human" / "all.jsonl")
    train_encoder(config, folder / "human-encoder")
    if not (folder / "human-llm" / "pretrain.json").exists():
        config = RECIPE["get_config"]("human-llm")
        sentences = [json.loads(line)["text"] for line in manifests["all"]]
        train_llm(config, sentences, folder / "human-llm", longest=80)  # the rest is slow


def configure(name: str, folder: Path):
    """The recipe of "world,arm,seed" with the parts and the data of `folder`."""
    config = RECIPE["get_config"](name)
    config.data.cache = str(folder / "data")
    for part in (config.encoder, config.llm):
        part.path = str(folder / Path(part.path).name)
    if not config.synthetic.num_train:
        manifests = {path.stem: str(path) for path in sorted((folder / "human").glob("*.jsonl"))}
        config.data.train, config.data.dev = manifests.pop("train"), manifests.pop("dev")
        manifests.pop("all")
        config.data.test = ",".join(f"{name}={path}" for name, path in manifests.items())
    return config


def run(name: str, folder: Path) -> dict:
    """Trains and evaluates "world,arm,seed"; returns its line of the results."""
    config = configure(name, folder)
    with tempfile.TemporaryDirectory(prefix="study-") as workdir:
        began = time.perf_counter()
        trained = train_whole(config, workdir)
        train_seconds = time.perf_counter() - began
        lines = tracking.read(rundir.of(workdir))
        speeds = [line.get("steps_per_sec", 0.0) for line in lines]
        results = test(trained, config, workdir)
    world, arm, seed = name.split(",")[:3]
    return {
        "run": name, "world": world, "arm": arm, "seed": int(seed),
        "changes": name.split(",")[3:],
        **results,
        # The fastest stretch: the machine may be busy with other things at times.
        "step_seconds": round(1 / max(speeds), 5) if any(speeds) else None,
        "seconds": [round(train_seconds, 1), round(time.perf_counter() - began - train_seconds, 1)],
        "process": os.getpid(),
        "versions": {
            "jax": jax.__version__,
            "espeakng-loader": importlib.metadata.version("espeakng-loader"),
        },
    }  # fmt: skip


def course(name: str, folder: Path) -> list[dict]:
    """Trains "world,arm,seed" and tests it in-domain every COURSE_EVERY steps, from step 0 on."""
    config = configure(name, folder)
    config.checkpoint_every, config.keep_checkpoints = COURSE_EVERY, config.num_steps
    lines = []
    with tempfile.TemporaryDirectory(prefix="study-") as workdir:
        start = configure(name, folder)
        start.num_steps, start.otreg.start_step, start.optim.restart_step = 1, 0, 0
        start.optim.warmup_steps = 1
        # The first step's learning rate is 0: what it leaves is the start.
        runs = {0: train_whole(start, Path(workdir, "start"))}
        train_whole(config, Path(workdir, "run"))
        for step in range(COURSE_EVERY, config.num_steps + 1, COURSE_EVERY):
            runs[step] = build.load_run(Path(workdir, "run"), str(step))
        for step, trained in runs.items():
            Path(workdir, str(step)).mkdir()
            result = test(trained, config, Path(workdir, str(step)), only=("dev",))
            line = {"run": name, "step": step, "wer": result["sets"]["dev"]["wer"]}
            lines.append(line | {"spoken_mass": result["spoken_mass"]})
    return lines


def test(run: build.Run, config, workdir, only: tuple[str, ...] = ()) -> dict:
    """Errors on every set, or on those of these names, and the plan's mass on the word truly spoken
    where that is known.

    Errors are of words, of recordings those of characters.
    """
    utterances, _ = sets.load_eval(config, workdir)
    utterances = {name: found for name, found in utterances.items() if not only or name in only}
    synthetic = bool(config.synthetic.num_train)
    decode = decoding.Settings(max_tokens=16 if synthetic else 120)
    files = rundir.of(workdir)
    with recognition.Partial(files.partial, {}) as partial:
        rows, samples = recognition.decode_sets(
            run, utterances, decode, LAYER, 48, files.eval_skipped, "evaluating", partial
        )
    scores = evaluate.score_rows(rows, ["dev"])
    by_set = {}
    for name, score in scores.items():
        column = lambda key, name=name: [row[key] for row in rows if row["set"] == name]
        hypotheses = column("hypothesis")
        words, characters = metrics.normalized_counts(
            column("reference"), hypotheses, column("lang")
        )
        counts = words if synthetic else characters
        by_set[name] = {
            "wer": score["wer"], "cer": score["cer"],
            "errors": counts.errors.tolist(), "lengths": counts.lengths.tolist(),
        }  # fmt: skip
        if synthetic:
            by_set[name]["hallucinated"] = hallucinated(hypotheses, config.synthetic)
    if not synthetic:
        return {"sets": by_set}
    figures = alignment.measure(samples)["dev"]["figures"]
    return {"sets": by_set} | {name: figures[name] for name in ("spoken_mass", "spoken_mass_even")}


def hallucinated(hypotheses: list[str], grammar) -> float:
    """The share of outputs that are sentences of the training templates; in a new text domain none
    should be."""
    slot = lambda match: "(?:" + "|".join(grammar.slots[match[1]]) + ")"
    patterns = [re.sub(r"{(\w+)}", slot, template) for template in grammar.templates]
    return float(np.mean([any(re.fullmatch(p, h) for p in patterns) for h in hypotheses]))


def read_results(path: Path = RESULTS) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --------------------------------------------------------------------------------------- reporting


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
    """Over the seeds that both arms have; None without any.

    The interval is a paired bootstrap over seeds and sentences: both are drawn with replacement,
    and a sentence brings its errors in all sets and under all the drawn seeds with it.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    length_U = errors_and_lengths(ours[seeds[0]], names)[1]
    errors = lambda runs: np.stack([errors_and_lengths(runs[seed], names)[0] for seed in seeds])
    difference_NU = 100.0 * (errors(ours) - errors(theirs))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        rows = rng.integers(len(seeds), size=len(seeds))
        columns = rng.integers(len(length_U), size=len(length_U))
        drawn.append(difference_NU[rows][:, columns].mean(axis=0).sum() / length_U[columns].sum())
    low, high = np.quantile(drawn, (0.025, 0.975))
    wins = int((difference_NU.sum(axis=1) < 0).sum())
    mean = difference_NU.mean(axis=0).sum() / length_U.sum()
    return Difference(float(mean), float(low), float(high), wins, len(seeds))


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
        return f"no difference to {reference} that its interval carries on {shift}"
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
                    [c["step"] for c in found], [c["spoken_mass"] for c in found], f"C{i}.-",
                    label=arm if seed == question.seeds[0] else None, alpha=0.7,
                )  # fmt: skip
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
        parts += ["## Where the plans lie during training", COURSE,
                  "![Plan mass on the spoken word](study-courses.png)",
                  *(course_table(courses, question) for question in COURSES)]  # fmt: skip
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="world,arm,seed; default: all of the study")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th run, from the I-th on")
    parser.add_argument("--folder", default=str(ROOT / RECIPE["FOLDER"]), help="parts and speech")
    parser.add_argument("--human", type=Path, help="recordings; without them no human runs")
    parser.add_argument("--courses", action="store_true", help="the runs of COURSES, on the way")
    parser.add_argument("--report", action="store_true", help="write docs/study.md only")
    args = parser.parse_args()
    if not args.report:
        config_lib.quiet_and_cached()
        prepare(Path(args.folder))
        if args.human:
            prepare_human(args.human, Path(args.folder))
        asked = [q for q in QUESTIONS if args.human or q.world != "human"]
        names = args.runs or list(dict.fromkeys(n for q in asked for n in q.runs()))
        make, path = lambda name: [run(name, Path(args.folder))], RESULTS
        if args.courses:
            names = args.runs or [name for question in COURSES for name in question.runs()]
            make, path = lambda name: course(name, Path(args.folder)), COURSE_RESULTS
        part, parts = map(int, args.part.split("/"))
        for name in tqdm.tqdm(names[part::parts], desc="study", unit="run"):
            if name not in {r["run"] for r in read_results(path)}:
                lines = [json.dumps(line) + "\n" for line in make(name)]
                with path.open("a") as file:
                    file.write("".join(lines))
    write_pages(read_results())


if __name__ == "__main__":
    main()
