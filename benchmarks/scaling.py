"""The training step at scale, on paper: compiled for TPU slices on a machine that has none.

    python -m benchmarks.scaling             # goes on where it stopped; minutes a compilation
    python -m benchmarks.scaling --report    # writes docs/scaling.md from the results alone

Every line of benchmarks/results/scaling.jsonl is what otreg_jax.aot found for an arm of
configs/multilingual.py (Whisper-large-v3 + Qwen2.5-7B, by their shapes in benchmarks/shapes) on a
slice. Needs libtpu (pip install 'jax[tpu]').
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from absl import app, flags

from otreg_jax import flops
from otreg_jax.aot import GIB

_REPORT = flags.DEFINE_bool("report", False, "Only write the document.")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/scaling.jsonl"
DOCUMENT = ROOT / "docs/scaling.md"
SHAPES = Path("benchmarks/shapes")
# (topology, slices, the device_kind of its chips)
SLICES = (
    ("v5e:4x4", 1, "TPU v5 lite"), ("v6e:8x8", 1, "TPU v6 lite"), ("v5p:4x4x4", 1, "TPU v5"),
    ("v5p:4x4x4", 2, "TPU v5"),
)  # fmt: skip
ARMS = {"otreg": "LoRA", "full": "full fine-tuning"}
LARGEST = (("otreg", "v5p:4x4x4", 1),)  # three compilations or more instead of one
SECONDS, TOKENS = 15, 96  # utterances as Multilingual LibriSpeech has them
BATCH = 256


def command(arm: str, topology: str, slices: int) -> list[str]:
    """The user's command for one line."""
    return [
        "python", "-m", "otreg_jax.aot", f"--config=configs/multilingual.py:{arm}",
        f"--topology={topology}", f"--slices={slices}", f"--config.mesh.data={slices}",
        f"--config.encoder.path={SHAPES}/whisper-large-v3",
        f"--config.llm.path={SHAPES}/qwen2.5-7b", f"--config.batch_size={BATCH}",
        f"--seconds={SECONDS}", f"--tokens={TOKENS}",
        *(["--largest_batch"] if (arm, topology, slices) in LARGEST else []),
    ]  # fmt: skip


def stored() -> dict[tuple, dict]:
    """{(arm, topology, slices): line}"""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    lines = [json.loads(line) for line in lines]
    return {(line["arm"], line["topology"], line["slices"]): line for line in lines}


def measure() -> None:
    """Compiles what has no line yet."""
    for topology, slices, _ in SLICES:
        for arm in ARMS:
            if (arm, topology, slices) in stored():
                continue
            words = command(arm, topology, slices)
            print(" ".join(words), flush=True)
            with tempfile.NamedTemporaryFile("r") as out:
                words = [sys.executable, *words[1:], f"--out={out.name}"]
                subprocess.run(words, cwd=ROOT, check=True)
                result = json.loads(out.read())
            versions = {name: version(name) for name in ("jax", "libtpu")}
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps({"arm": arm, **result, **versions}) + "\n")


def report() -> str:
    """docs/scaling.md, every figure from the results."""
    results = stored()
    if not results:
        sys.exit(f"{RESULTS}: no results yet; run python -m benchmarks.scaling")
    kinds = {(topology, slices): kind for topology, slices, kind in SLICES}
    parts = list(next(iter(results.values()))["memory"])
    memory = [
        "| slice | training | " + " | ".join(parts) + " | peak | of | fits | largest batch |",
        "|---|---|" + "---:|" * (len(parts) + 4),
    ]
    cost = [
        "| slice | training | model FLOPs a chip | seconds at peak | collectives (times, GiB) |",
        "|---|---|---:|---:|---|",
    ]
    for (arm, topology, slices), line in results.items():
        name = f"{slices} x {topology}" if slices > 1 else topology
        gib = lambda size: f"{size / GIB:.2f}"
        largest = line.get("largest_batch")
        sizes = " | ".join(gib(line["memory"][part]) for part in parts)
        memory.append(
            f"| {name} | {ARMS[arm]} | {sizes} | {gib(line['peak'])} | {gib(line['capacity'])} | "
            f"{'yes' if line['peak'] <= line['capacity'] else 'no'} | "
            + (f"{largest} ({gib(line['largest_peak'])} GiB) |" if largest else "not searched |")
        )
        chip = next(c for regex, c in flops.CHIPS if regex in kinds[topology, slices])
        each = line["flops"] / line["devices"]
        collectives = "; ".join(
            f"{kind} {times}, {size / GIB:.1f}"
            for kind, (times, size) in line["collectives"].items()
        )
        cost.append(
            f"| {name} | {ARMS[arm]} | {each:.3g} | {each / chip.flops:.2f} | "
            f"{collectives or 'not known: does not fit'} |"
        )
    any_line = next(iter(results.values()))
    return TEMPLATE.format(
        batch=BATCH, seconds=SECONDS, tokens=TOKENS, positions=any_line["positions"],
        jax=any_line["jax"], libtpu=any_line["libtpu"], memory="\n".join(memory),
        cost="\n".join(cost), command=" \\\n    ".join(command("otreg", "v5p:4x4x4", 1)),
    )  # fmt: skip


TEMPLATE = """# Scale, on paper

<!-- Written by python -m benchmarks.scaling --report from benchmarks/results/scaling.jsonl. -->

`python -m otreg_jax.aot` compiles the real training step (loss, OTReg, gradients, optimizer,
donated state) for devices that are not there. These are its figures for `configs/multilingual.py`,
Whisper-large-v3 + Qwen2.5-7B, with utterances of {seconds} s and {tokens} tokens (LLM sequences of
{positions} positions), {batch} utterances a step; jax {jax}, libtpu {libtpu}. No step was run:
memory and collectives are the compiler's, FLOPs are those of the traced program's matrix products,
without recomputation, and "seconds at peak" is FLOPs over the chip's data-sheet rate: a bound that
no real step reaches.

## Memory of one chip, GiB

{memory}

"largest batch" was compiled, too, not extrapolated.

## What a step costs

{cost}

Collectives are counted on one chip with loops multiplied out; bytes are those of the results.

## Again, or for your model

```
{command}
```

`--topology=cpu:8` does the same without libtpu for a host with 8 CPU devices. Weights are never
read: a directory with a `config.json` is enough for `encoder.path` and `llm.path`.
"""


def main(argv):
    del argv
    if not _REPORT.value:
        measure()
    DOCUMENT.write_text(report())
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    app.run(main)
