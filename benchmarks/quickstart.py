"""The quickstart over seeds: every arm on every set, mean and spread.

    python -m benchmarks.quickstart --seeds=0,1,2

Runs `launch/train_local.sh` once a seed (a finished seed is not run again), then writes
benchmarks/results/quickstart.json and the table in docs/quickstart.md from it.
"""

import argparse
import json
import pathlib
import subprocess
import time

import numpy as np

from otreg_jax import rundir

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quickstart.json"
PAGE = ROOT / "docs" / "quickstart.md"
ARMS = {"ce": "-ce", "position": "-position", "otreg": ""}
BEGIN, END = "<!-- table: python -m benchmarks.quickstart -->", "<!-- end of table -->"


def run_seed(folder: pathlib.Path, seed: int) -> dict:
    """{"seed", "seconds", "versions", "wer": {set: {arm: fraction}}, "spoken_mass": likewise}"""
    workdir = folder / f"seed{seed}"
    record = folder / f"seed{seed}.json"
    if not record.exists():
        start = time.perf_counter()
        command = ["bash", "launch/train_local.sh", f"--workdir={workdir}", f"--config.seed={seed}"]
        subprocess.run(command, cwd=ROOT, check=True)
        record.write_text(json.dumps({"seconds": time.perf_counter() - start}))
    results = {
        arm: json.loads(rundir.of(f"{workdir}{suffix}").results.read_text())
        for arm, suffix in ARMS.items()
    }
    sets = list(results["otreg"]["sets"])
    mass = lambda row: row["alignment"]["spoken_mass"]
    of_set = lambda value: {
        name: {arm: value(results[arm]["sets"][name]) for arm in ARMS} for name in sets
    }
    return {
        "seed": seed,
        "seconds": json.loads(record.read_text())["seconds"],
        "versions": results["otreg"]["versions"],
        "wer": of_set(lambda row: row["wer"]),
        "spoken_mass": of_set(mass),
    }


def table(records: list[dict]) -> str:
    """Mean ± sample standard deviation of the WER in percent, a row a set."""
    lines = [
        "| set | cross-entropy | position-only plan | OTReg | OTReg − CE | OTReg − position |",
        "|---|---|---|---|---|---|",
    ]
    for name in records[0]["wer"]:
        wer = {arm: 100 * np.array([r["wer"][name][arm] for r in records]) for arm in ARMS}
        columns = [*wer.values(), wer["otreg"] - wer["ce"], wer["otreg"] - wer["position"]]
        cells = [f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" for x in columns[:3]]
        cells += [f"{x.mean():+.1f} ± {x.std(ddof=1):.1f}" for x in columns[3:]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seconds = [r["seconds"] for r in records]
    seeds, versions = ", ".join(str(r["seed"]) for r in records), records[0]["versions"]
    lines += [
        "",
        f"WER in percent, mean ± standard deviation over seeds {seeds}; {versions['devices']}, jax "
        f"{versions['jax']}; three runs and evaluation took {min(seconds):.0f} s (fastest seed).",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="at least two, separated by commas")
    parser.add_argument(
        "--workdir", default="runs/quickstart-seeds", help="where the runs are kept"
    )
    args = parser.parse_args()
    folder = pathlib.Path(args.workdir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    records = [run_seed(folder, int(seed)) for seed in args.seeds.split(",")]
    RESULTS.write_text(json.dumps(records, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(records)}\n\n{END}{after}")
    print(table(records))


if __name__ == "__main__":
    main()
