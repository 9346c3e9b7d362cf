"""Kills and terminates a small run at random moments and checks that nothing is lost.

    python benchmarks/faults.py                    # 20 x kill -9, 10 x SIGTERM
    python benchmarks/faults.py --kills=3 --terms=1 --seed=7

A run with a checkpoint every few steps is killed and started again until all faults have happened,
at moments drawn from --seed: some steps after it resumed, so that saves under way are hit too, or
before it has started to train. Whatever metrics.jsonl holds after each fault and at the end must
equal, to the bit, that of a run that nothing disturbed; SIGTERM must end with exit code 75 (or
kill, while Python is importing); no leftover of a killed save may stand in the way. At the end the
newest checkpoint is truncated: the next start must warn and go on from the one before. Writes
benchmarks/results/faults.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from otreg_jax import rundir

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
CHECKPOINT_EVERY = 4
RESTART = 75
WORDS = ("do", "re", "mi", "fa", "sol")

RECIPE = """
from otreg_jax import config as config_lib

def get_config():
    c = config_lib.default()
    c.data.train = {manifest!r}
    c.num_steps, c.checkpoint_every, c.log_every, c.batch_size = {num_steps}, {every}, 1, 4
    c.data.num_mels, c.data.num_buckets = 16, 1
    c.data.augment.update(freq_masks=1, freq_width=8)
    c.tokenizer.model_type = "word"
    c.encoder.update(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32, strides=(2, 2))
    c.encoder.max_positions = 64
    c.adapter.hidden_dim = 16
    c.llm.update(embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)
    c.otreg.weight, c.otreg.num_iters = 1.0, 10
    return c
"""


def write_data(folder: Path) -> Path:
    """A manifest of twelve utterances in which each word is a tone."""
    rng = np.random.default_rng(0)
    with open(folder / "train.jsonl", "w") as file:
        for i in range(12):
            words = rng.integers(len(WORDS), size=2 + i % 4)
            time_N = np.arange(2400) / 16000
            tones = [np.sin(2 * np.pi * (300 + 150 * word) * time_N) for word in words]
            soundfile.write(folder / f"{i}.wav", 0.3 * np.concatenate(tones), 16000)
            text = " ".join(WORDS[word] for word in words)
            line = {"audio_filepath": f"{i}.wav", "text": text, "duration": 0.15 * len(words)}
            file.write(json.dumps(line) + "\n")
    return folder / "train.jsonl"


def start(folder: Path, workdir: Path) -> subprocess.Popen:
    """A training process; what it prints is appended to WORKDIR.log."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        sys.executable,
        "-m",
        "otreg_jax.train",
        f"--config={folder / 'recipe.py'}",
        f"--workdir={workdir}",
    ]
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def read_metrics(workdir: Path) -> dict[int, dict]:
    """{step: line of metrics.jsonl without what depends on the clock}; no half-written line."""
    lines = rundir.read_lines(rundir.of(workdir).metrics, "no run may write this")
    of_clock = lambda key: key.endswith("per_sec") or key in ("time", "elapsed", "goodput", "mfu")
    return {line["step"]: {k: v for k, v in line.items() if not of_clock(k)} for line in lines}


def last_step(workdir: Path) -> int:
    return max(read_metrics(workdir), default=0)


def newest_checkpoint(workdir: Path) -> int:
    return max(rundir.checkpoint_steps(rundir.of(workdir)), default=0)


def unfinished_saves(workdir: Path) -> list[str]:
    return [path.name for path in rundir.of(workdir).checkpoints.glob("*tmp*")]


def strike(kind: str, folder: Path, workdir: Path, rng: random.Random) -> dict | None:
    """Starts the run and sends it a signal at a random moment; None if it finished before that."""
    early = rng.random() < 0.15
    steps, delay = rng.randint(1, 5 * CHECKPOINT_EVERY), rng.uniform(0, 0.05)
    patience = rng.uniform(0, 8)
    resumed = newest_checkpoint(workdir)
    process = start(folder, workdir)
    begun = time.monotonic()
    seen = lambda: resumed < last_step(workdir) and last_step(workdir) >= resumed + steps
    # metrics.jsonl is cut back to the resumed step at the start: wait for that, then for steps.
    mark = os.path.getmtime(rundir.of(workdir).metrics) if last_step(workdir) else 0
    fresh = lambda: last_step(workdir) and os.path.getmtime(rundir.of(workdir).metrics) > mark
    while process.poll() is None:
        if time.monotonic() - begun > patience if early else fresh() and seen():
            break
        time.sleep(0.005)
    time.sleep(0 if early else delay)
    process.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
    code = process.wait(timeout=120)
    if code == 0:
        return None
    expected = [-signal.SIGKILL] if kind == "kill" else [RESTART] + [-signal.SIGTERM] * early
    return {
        "kind": kind,
        "resumed_at": resumed,
        "last_step_logged": last_step(workdir),
        "before_training": early,
        "unfinished_saves": unfinished_saves(workdir),
        "newest_checkpoint": newest_checkpoint(workdir),
        "exit_code": code,
        "as_expected": code in expected,
    }


def differing_steps(workdir: Path, reference: dict[int, dict]) -> list[int]:
    return [step for step, line in read_metrics(workdir).items() if line != reference[step]]


def truncate_newest(workdir: Path) -> int:
    """Cuts the larger files of the newest checkpoint short; returns its step."""
    step = newest_checkpoint(workdir)
    for path in (rundir.of(workdir).checkpoints / str(step)).rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:100])
    return step


def finish(folder: Path, workdir: Path, reference: dict[int, dict], problems: list[str]) -> None:
    """Lets the run end, and checks that all its steps are those of the reference."""
    code = start(folder, workdir).wait()
    if code:
        problems.append(f"the run does not finish: exit code {code}, see {workdir}.log")
    elif read_metrics(workdir) != reference:
        problems.append(f"at the end: steps {differing_steps(workdir, reference)[:5]} differ")
    if unfinished_saves(workdir):
        problems.append(f"left over: {unfinished_saves(workdir)}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300, help="of the run; a new one follows it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    faults = ["kill"] * args.kills + ["term"] * args.terms
    rng.shuffle(faults)
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    manifest = str(write_data(folder))
    recipe = RECIPE.format(manifest=manifest, num_steps=args.steps, every=CHECKPOINT_EVERY)
    (folder / "recipe.py").write_text(recipe)

    print(f"an undisturbed run of {args.steps} steps in {folder}", flush=True)
    if start(folder, folder / "reference").wait():
        sys.exit(f"it fails: see {folder / 'reference'}.log")
    reference = read_metrics(folder / "reference")
    runs, events, problems = 1, [], []
    workdir = folder / "run1"
    while len(events) < len(faults) and not problems:
        event = strike(faults[len(events)], folder, workdir, rng)
        differing = differing_steps(workdir, reference)
        if differing:
            problems.append(f"after {event}: steps {differing[:5]} differ")
        if event is None:  # finished before the fault came: go on with a new run
            runs += 1
            workdir = folder / f"run{runs}"
            continue
        events.append(event)
        if not event["as_expected"]:
            problems.append(f"wrong exit code: {event}")
        print(f"{len(events)}/{len(faults)} {event}", flush=True)
    if not problems:
        finish(folder, workdir, reference, problems)
    fell_back = None
    if not problems:
        step = truncate_newest(workdir)
        finish(folder, workdir, reference, problems)
        fell_back = f"step {step} cannot be read" in Path(f"{workdir}.log").read_text()
        if not fell_back:
            problems.append("no warning of the truncated checkpoint")

    count = lambda kind: sum(event["kind"] == kind for event in events)
    results = {
        "seed": args.seed,
        "kills": count("kill"),
        "terms": count("term"),
        "kills_during_a_save": sum(
            event["kind"] == "kill" and bool(event["unfinished_saves"]) for event in events
        ),
        "runs": runs,
        "num_steps": args.steps,
        "checkpoint_every": CHECKPOINT_EVERY,
        "truncated_checkpoint_skipped": fell_back,
        "problems": problems,
        "seconds": round(time.monotonic() - begun, 1),
        "events": events,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(
        f"{results['kills']} kills ({results['kills_during_a_save']} during a save), "
        f"{results['terms']} SIGTERMs, {len(problems)} problems; losses bit-identical to the "
        f"undisturbed run: {'no' if problems else 'yes'} ({results['seconds']:.0f} s); {args.out}"
    )
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        shutil.rmtree(folder)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
