"""The study on real parts: what aligning first, by which loss, is worth on human speech.

    python -m benchmarks.study_real --encoder=whisper-base --llm=smollm2-135m \\
        --corpora=read=DIR1,talk=DIR2 --size=cpu            # all that is missing
    python -m benchmarks.study_real ... read,ctc+otreg0/ce,1   # these runs only
    python -m benchmarks.study_real ... --minutes=30        # starts no run after so long
    python -m benchmarks.study_real --report                # docs/study.md, nothing trained

A run "world,align/sft,seed" trains configs/laptop.py on a world (a corpus, or "all"): first the
adapter by the losses `align`, then adapter and LoRA by the losses `sft`. `align` is "none" where
all steps are of the second kind, "skip" where there are as many of them as take as long as both
stages do. A corpus is a folder with train.jsonl, dev.jsonl and test.jsonl; --sentences=FILE adds
"spoken": a text that eSpeak NG speaks, in voices for testing that it does not train on. Every run
is tested on all corpora, on --tests=name=manifest,..., and on --rough recordings of each in noise
and in echoes.

A run is one JSON line of benchmarks/results/study_real.jsonl, or of --out; what has its line in
either is not run again, and an interrupted run goes on where it was. What the frozen encoder gives
is computed once a corpus, into --folder. --jobs=N makes so many runs side by side, each in a
process of its own: a GPU is idle most of a run so small.
"""

import argparse
import concurrent.futures
import json
import runpy
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import tqdm

from benchmarks import common, laptop, study, study_real_report
from benchmarks.study_questions import ROOT, read_results
from benchmarks.study_real_report import QUESTIONS, RESULTS, ROUGH
from otreg_jax import (
    alignment,
    build,
    command,
    decoding,
    evaluate,
    metrics,
    recognition,
    rundir,
    tracking,
)
from otreg_jax.data import audio, manifest, sets, spoken, synthetic

SPOKEN = {"num_train": 1300, "num_test": 88, "dev": 24}  # sentences of the corpus that is spoken
# Steps that align in the time of one through the LLM; 19 to 44 were measured on two CPU cores.
ALIGN_PER_SFT = 20
LAYER = 0  # where the gap between speech and text of every run is measured
FADING = {"position_weight": 3.0, "position_weight_final": 0.0}
# What losses can be named; a stage takes several, joined by "+".
LOSSES = {
    "none": {},
    "ce": {"ce": {"weight": 1.0}},
    "ctc": {"ctc": {"weight": 1.0}},
    "otreg0": {"otreg": {"weight": 1.0, **FADING}},
    "otreg1": {"otreg": {"weight": 1.0, "layer": 1, **FADING}},
    "otreg4": {"otreg": {"weight": 1.0, "layer": 4, **FADING}},
    "layers01": {"otreg": {"weight": 1.0, "layer_weights": (0.5, 0.5), **FADING}},
    # The weights that Le et al. 2023 (arXiv 2301.11716) publish for OT beside CTC.
    "faint0": {"otreg": {"weight": 0.1, "position_weight": 1.0, "position_weight_final": -1.0}},
    "position0": {
        "otreg": {
            "weight": 1.0,
            "plan": "position",
            "position_weight": 3.0,
            "position_weight_final": -1.0,
        }
    },
    "collapsed0": {"otreg": {"weight": 1.0, "after_ctc": True, **FADING}},
    # Silence may keep its mass: as in the toy study's untrimmed worlds.
    "relaxed0": {"otreg": {"weight": 1.0, "speech_tau": 0.5, **FADING}},
    "window0": {"otreg": {"weight": 1.0, "window": 0.2, **FADING}},
    "structure0": {"otreg": {"weight": 1.0, "structure": 0.5, **FADING}},
    "gaussian0": {
        "otreg": {
            "weight": 1.0,
            "position": "gaussian",
            "position_weight": 0.005,
            "position_weight_final": 0.0,
        }
    },
    "kl": {"kl": {"weight": 1.0}},
}


class Size(NamedTuple):
    """How long a run is.

    align, sft: steps. batch: utterances a step. tested: utterances of each test set, at most.
    watched: utterances of each dev set, at most, that the course of the errors is measured on,
    `every` so many steps of the second stage.
    """

    align: int
    sft: int
    batch: int
    tested: int
    watched: int
    every: int


SIZES = {
    "short": Size(align=300, sft=100, batch=8, tested=64, watched=16, every=50),
    "cpu": Size(align=800, sft=350, batch=8, tested=100, watched=24, every=100),
    "gpu": Size(align=800, sft=400, batch=16, tested=160, watched=48, every=100),
}


def losses_of(names: str) -> dict:
    """The sections of a stage that the losses "ctc+otreg0" ask for, all others being off.

    Raises:
      ValueError: a name is unknown.
    """
    chosen = names.split("+")
    if unknown := [name for name in chosen if name not in LOSSES]:
        raise ValueError(f"no such losses: {', '.join(unknown)}; there are {', '.join(LOSSES)}")
    sections = {name: {"weight": 0.0} for name in ("ce", "ctc", "kl", "otreg")}
    for name in chosen:
        sections |= LOSSES[name]
    if sum(len(LOSSES[name]) for name in chosen) != sum(s["weight"] > 0 for s in sections.values()):
        raise ValueError(f"{names}: two of these are one loss with different settings")
    return sections


def configure(name: str, size: Size, folder: Path, manifests: dict, changes: dict):
    """configs/laptop.py for the run "world,align/sft,seed".

    manifests: {corpus: {"train": path, "dev": path, "test": path}}. changes: {key: value}, the
      directories of encoder and LLM among them.

    Raises:
      ValueError: the name means nothing.
    """
    world, arm, seed = name.split(",")
    align, _, sft = arm.partition("/")
    if world not in (*manifests, "all"):
        raise ValueError(f"{name}: no world {world!r}, there are {', '.join(manifests)} and all")
    recipe = runpy.run_path(str(ROOT / "configs" / "laptop.py"))
    config = recipe["get_config"]("ce")
    config.seed, config.batch_size = int(seed), size.batch
    config.data.cache = str(folder / "cache")
    chosen = manifests.values() if world == "all" else [manifests[world]]
    config.data.train = ",".join(str(split["train"]) for split in chosen)
    # All checkpoints are kept: the course of the errors is measured on them afterwards.
    config.num_steps = size.align + size.sft
    config.checkpoint_every = config.keep_every = size.every
    config.update_from_flattened_dict(changes)
    second = {"start": size.align, **losses_of(sft)}
    if align in ("none", "skip"):
        config.stages = {"sft": second | {"start": 0}}
        if align == "skip":
            config.num_steps = size.sft + -(-size.align // ALIGN_PER_SFT)
        else:
            config.checkpoint_every = config.keep_every = 2 * size.every
        return config
    first = {"start": 0, "optim": {"learning_rate": 2e-3}, "train": "^(adapter|ctc)/"}
    config.stages = {"align": first | losses_of(align), "sft": second}
    return config


def rough_copies(corpora: dict, count: int, folder: Path) -> dict[str, Path]:
    """{"corpus-noise": manifest, ...} of the first `count` recordings of each test set, made worse
    as ROUGH says and written to `folder`."""
    made = {}
    for corpus, split in corpora.items():
        for kind, how in ROUGH.items() if count else ():
            name = f"{corpus}-{kind}"
            path = folder / f"{name}-{count}.jsonl"
            made[name] = path
            if path.exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            lines = []
            for i, utterance in enumerate(manifest.read_manifest(split["test"])[:count]):
                rng = np.random.default_rng([zlib.crc32(name.encode()), i])
                samples = synthetic.worsen(audio.load_audio(utterance), rng, **how)
                samples *= 0.7 / np.abs(samples).max()
                soundfile.write(folder / f"{name}-{i}.flac", samples, audio.SAMPLE_RATE)
                line = {"audio_filepath": f"{name}-{i}.flac", "text": utterance.text}
                lines.append(json.dumps(line | {"lang": utterance.lang}, ensure_ascii=False) + "\n")
            path.write_text("".join(lines))
    return made


def spoken_corpus(sentences: str, folder: Path) -> Path:
    """A corpus of these sentences as eSpeak NG speaks them; no voice of its test set is trained on.

    sentences: what `synthetic.sentences` takes. Its manifests have the words' times.
    """
    corpus = folder / "spoken"
    if (corpus / "test.jsonl").exists():
        return corpus
    asked = {key: SPOKEN[key] for key in ("num_train", "num_test")} | {"sentences": sentences}
    asked |= {"rates": (120, 220), "seed": 0, "conditions": {"test": {"voices": "other"}}}
    made = synthetic.synthesize(spoken.sets(asked), corpus)
    for split, chosen in {
        "train": slice(None),
        "dev": slice(SPOKEN["dev"]),
        "test": slice(SPOKEN["dev"], None),
    }.items():
        found = manifest.read_manifest(made[split])[chosen]
        manifest.write_manifest(corpus / f"{split}.jsonl", found)
    return corpus


def seconds_per_step(lines: list[dict], first: int, last: int) -> float | None:
    """Of the fastest stretch between two steps: the machine may be busy with other things."""
    speeds = [
        x["steps_per_sec"] for x in lines if first < x["step"] <= last and "steps_per_sec" in x
    ]
    return round(1 / max(speeds), 4) if speeds and max(speeds) > 0 else None


def measure(workdir: Path, step: int, utterances: sets.Sets) -> dict:
    """Errors of a checkpoint on every set, and how near speech and text are at LAYER."""
    trained = build.load_run(workdir, str(step))
    longest = max(len(trained.tokenizer.encode(u.text)) for us in utterances.values() for u in us)
    decode = decoding.Settings(max_tokens=5 * longest // 4 + 8)
    files = rundir.of(workdir)
    asked = {"step": step, "ids": [u.id for found in utterances.values() for u in found]}
    with recognition.Partial(files.partial, asked) as partial:
        rows, samples = recognition.decode_sets(
            trained, utterances, decode, LAYER, 24, files.eval_skipped, f"step {step}", partial
        )
    gaps = alignment.measure(samples)
    found = {}
    for name, score in evaluate.score_rows(rows, []).items():
        mine = [row for row in rows if row["set"] == name]
        column = lambda key, mine=mine: [row[key] for row in mine]
        words, _ = metrics.normalized_counts(
            column("reference"), column("hypothesis"), column("lang")
        )
        found[name] = {
            "wer": score["wer"],
            "cer": score["cer"],
            "errors": words.errors.tolist(),
            "lengths": words.lengths.tolist(),
            "gap": gaps[name]["figures"],
            "first": [[row["reference"], row["hypothesis"]] for row in mine[:3]],
        }
    return found


def workdir_of(name: str, size_name: str, folder: Path) -> Path:
    return folder / size_name / name.replace("/", "_").replace(",", "-")


def run(name: str, size_name: str, config, tests: str, dev: str, folder: Path) -> dict:
    """Trains and tests a configuration; its line of the results.

    tests, dev: "name=manifest,...".
    """
    size = SIZES[size_name]
    workdir = workdir_of(name, size_name, folder)
    study.train_whole(config, workdir)
    lines = tracking.read(rundir.of(workdir))
    world, arm, seed = name.split(",")
    align = 0 if "align" not in config.stages else config.stages.sft.start
    speed = {
        "align": seconds_per_step(lines, 0, align),
        "sft": seconds_per_step(lines, align, config.num_steps),
    }
    minutes = lambda step: (
        (min(step, align) * (speed["align"] or 0) + max(step - align, 0) * (speed["sft"] or 0)) / 60
    )

    def course(step: int) -> dict:
        found = measure(workdir, step, watched)
        keep = ("wer", "gap")
        shown = {name: {key: row[key] for key in keep} for name, row in found.items()}
        return {"step": step, "minutes": round(minutes(step), 3), "sets": shown}

    load = lambda manifests, count: {
        name: found[:count] for name, found in sets.load_eval(config, workdir, manifests)[0].items()
    }
    watched, tested = load(dev, size.watched), load(tests, size.tested)
    began = time.perf_counter()
    steps = [step for step in rundir.checkpoint_steps(rundir.of(workdir)) if step >= align]
    courses = [course(step) for step in sorted(steps)]
    return {
        "run": name,
        "size": size_name,
        "world": world,
        "arm": arm,
        "seed": int(seed),
        "steps": [align, config.num_steps - align],
        "seconds_per_step": speed,
        "minutes": round(minutes(config.num_steps), 3),
        "sets": measure(workdir, config.num_steps, tested),
        "course": courses,
        "test_seconds": round(time.perf_counter() - began, 1),
        "machine": common.describe_machine("flax"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="world,align/sft,seed; default: all of --size")
    parser.add_argument("--encoder", help="directory of a Whisper model")
    parser.add_argument("--llm", help="directory of a language model")
    parser.add_argument("--corpora", help="name=folder,... with {train,dev,test}.jsonl")
    parser.add_argument("--sentences", default="", help="text, for the corpus that is spoken")
    parser.add_argument("--tests", default="", help="name=manifest,...: further test sets")
    parser.add_argument("--rough", type=int, default=0, help="recordings of each, worsened")
    parser.add_argument("--lang", default="en", help='lines of this language only; "": all')
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="settings")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study_real")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the lines of these runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--report", action="store_true", help="write docs/study.md only")
    args = parser.parse_args()
    if not args.report:
        if not (args.encoder and args.llm and args.corpora):
            sys.exit("study_real: --encoder, --llm and --corpora are needed to train")
        command.quiet_and_cached()
        make_runs(args)
        if args.out != RESULTS:
            return
    study_real_report.write_page(read_results(RESULTS))


def make_runs(args) -> None:
    """Makes the runs that are asked for and have no line yet."""
    began = time.monotonic()
    folders = laptop.corpora(args.corpora)
    if args.sentences:
        folders["spoken"] = spoken_corpus(args.sentences, args.folder)
    found = laptop.manifests(folders, [args.lang], args.folder)
    named = lambda split: ",".join(f"{name}={paths[split]}" for name, paths in found.items())
    rough = rough_copies(found, args.rough, args.folder / "rough")
    rough = ",".join(f"{name}={path}" for name, path in rough.items())
    tests = ",".join(filter(None, [named("test"), rough, args.tests]))
    asked = args.runs or [name for q in QUESTIONS for name in q.runs(args.size)]
    lines = [line for path in {RESULTS, args.out} for line in read_results(path)]
    known = {(line["run"], line["size"]) for line in lines}
    missing = [name for name in dict.fromkeys(asked) if (name, args.size) not in known]
    changes = {"encoder.path": args.encoder, "llm.path": args.llm}
    for change in args.set:
        key, _, value = change.partition("=")
        changes[key] = json.loads(value)
    size = SIZES[args.size]
    configs = {name: configure(name, size, args.folder, found, changes) for name in missing}

    def make(name: str) -> bool:
        """Whether the run has its line now."""
        if time.monotonic() - began > 60 * args.minutes:
            return False
        if args.jobs > 1:
            return run_beside(name, args)
        line = run(name, args.size, configs[name], tests, named("dev"), args.folder)
        rundir.append_lines(args.out, [line])
        # What it kept is large: a checkpoint every few steps.
        shutil.rmtree(workdir_of(name, args.size, args.folder))
        return True

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        made = pool.map(make, missing) if args.jobs > 1 else map(make, missing)
        made = list(tqdm.tqdm(made, total=len(missing), desc="study", unit="run"))
    if left := [name for name, is_made in zip(missing, made, strict=True) if not is_made]:
        print(f"left for later: {', '.join(left)}")


def run_beside(name: str, args) -> bool:
    """A run by this very command in a process of its own, its output in a log of --folder; whether
    it ended well."""
    flags = [word for word in sys.argv[1:] if word not in args.runs]
    command = [sys.executable, "-m", "benchmarks.study_real", *flags, "--jobs=1", name]
    path = args.folder / "logs" / f"{name.replace('/', '_')}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as log:
        ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        print(f"{name} failed with {ended.returncode}: see {path}")
    return ended.returncode == 0


if __name__ == "__main__":
    main()
