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
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tqdm

from benchmarks.study_questions import (
    COURSE_EVERY,
    COURSE_RESULTS,
    COURSES,
    QUESTIONS,
    RECIPE,
    RESULTS,
    ROOT,
    read_results,
)
from benchmarks.study_report import write_pages
from otreg_jax import (
    alignment,
    build,
    cluster,
    command,
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
from otreg_jax.data import sets, tokenization

LAYER = 1  # where the plan of every arm is measured


def train_whole(config, workdir) -> build.Run:
    """Trains and loads the run; a run that is told to stop ends the program, and goes on at the
    next call."""
    state = train.train(config, workdir)
    if int(state.step) < config.num_steps:
        sys.exit(cluster.RESTART)
    return build.load_run(workdir)


def train_encoder(config, out: Path) -> None:
    """Saves the encoder of an SLM as Hugging Face weights, unless it is there."""
    if not (out / "config.json").exists():
        run = train_whole(config, out.with_name(f"{out.name}-run"))
        pretrained.save_speech_encoder(out, run.slm.encoder, run.params["encoder"])


def train_llm(config, sentences: list[str], out: Path, longest: int | None = None) -> None:
    """Saves an LLM taught the sentences of at most `longest` characters, all of which its tokenizer
    has seen."""
    tokenizer = tokenization.train_sentencepiece(
        sentences,
        out.with_name(out.name.replace("llm", "tokenizer")),
        config.tokenizer.vocab_size,
        model_type=config.tokenizer.model_type,
    )
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
        "run": name,
        "world": world,
        "arm": arm,
        "seed": int(seed),
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
    }


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
            "wer": score["wer"],
            "cer": score["cer"],
            "errors": counts.errors.tolist(),
            "lengths": counts.lengths.tolist(),
        }
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
        command.quiet_and_cached()
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
