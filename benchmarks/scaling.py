"""The training step at scale, on paper: compiled for TPU slices on a machine that has none.

    python -m benchmarks.scaling             # goes on where it stopped; minutes a compilation
    python -m benchmarks.scaling --report    # writes docs/scaling.md from the results alone

Every line of benchmarks/results/scaling.jsonl is what otreg_jax.aot found for an arm of
configs/multilingual.py (Whisper-large-v3 + Qwen2.5-7B, by their shapes in benchmarks/shapes) on a
TPU slice; that needs libtpu (pip install 'jax[tpu]'). benchmarks/results/scaling_cpu.json holds the
same of a 60M model on up to eight CPU devices, against their number, the batch, the length of the
audio and the vocabulary (`--cpu`).
"""

import ast
import dataclasses
import functools
import json
import re
import runpy
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from absl import app, flags

from benchmarks.common import SHAPES, recipe
from otreg_jax import aot, flops
from otreg_jax.aot import GIB

_CPU = flags.DEFINE_bool("cpu", False, "Only the sweep over CPU devices, and the document.")
_REPORT = flags.DEFINE_bool("report", False, "Only write the document.")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/scaling.jsonl"
CPU_RESULTS = ROOT / "benchmarks/results/scaling_cpu.json"
DOCUMENT = ROOT / "docs/scaling.md"
# (topology, slices): (device_kind of its chips, utterances a step)
SLICES = {
    ("v5p:4x4x4", 1): ("TPU v5", 512),
    ("v6e:8x8", 1): ("TPU v6 lite", 512),
    ("v5p:4x4x4", 2): ("TPU v5", 1024),
    ("v5e:4x4", 1): ("TPU v5 lite", 64),
    ("tpu7x:4x4x4", 1): ("TPU7x", 512),
}
ARMS = {"otreg": "LoRA", "full": "full fine-tuning"}
# What was set: the least memory, in the tables of all slices; and what trades memory for time, or
# is the recipe as it stands.
LEAN = ("remat=full", "ctc.weight=0.0")
TRADES = (
    ("otreg", "v5e:4x4", 1, ("remat=dots", "ctc.weight=0.0")),
    ("otreg", "v5e:4x4", 1, ("remat=none", "ctc.weight=0.0")),
    ("otreg", "v5e:4x4", 1, (*LEAN, "frozen_int8=True")),
    ("full", "v5e:4x4", 1, ("remat=dots", "ctc.weight=0.0")),
    ("otreg", "v5p:4x4x4", 1, ("remat=dots", "ctc.weight=0.3")),
    ("full", "v5p:4x4x4", 1, ("remat=dots", "ctc.weight=0.0")),
)
# Evaluation: (training, topology), as the recipe stands.
DECODE = (("otreg", "v5e:4x4"), ("full", "v5e:4x4"))
SECONDS, TOKENS = 15, 96  # utterances as Multilingual LibriSpeech has them
DECODED_ROWS, DECODED_TOKENS = 32, 152  # at once; at most, for the longest of such transcripts


def command(
    arm: str, topology: str, slices: int, changes: tuple[str, ...], program: str = "train"
) -> list[str]:
    """The user's command for one line."""
    rows, tokens = SLICES[topology, slices][1], TOKENS
    if program == "decode":
        rows, tokens = DECODED_ROWS, DECODED_TOKENS
    return [
        "python",
        "-m",
        "otreg_jax.aot",
        f"--config=configs/multilingual.py:{arm}",
        f"--topology={topology}",
        f"--slices={slices}",
        f"--config.encoder.path={SHAPES.relative_to(ROOT)}/whisper-large-v3",
        f"--config.llm.path={SHAPES.relative_to(ROOT)}/qwen2.5-7b",
        f"--config.batch_size={rows}",
        f"--seconds={SECONDS}",
        f"--tokens={tokens}",
        *([] if program == "train" else [f"--program={program}"]),
        *(f"--config.{change}" for change in changes),
    ]


def stored(program: str = "train") -> dict[tuple, dict]:
    """{(arm, topology, slices, changes): line} of a program."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    lines = [json.loads(line) for line in lines]
    lines = [line for line in lines if line.get("program", "train") == program]
    key = lambda line: (line["arm"], line["topology"], line["slices"], tuple(line["changes"]))
    return {key(line): line for line in lines}


def measure() -> None:
    """Compiles what has no line yet."""
    points = [((arm, topology, 1, ()), "decode") for arm, topology in DECODE]
    points += [((arm, *where, LEAN), "train") for where in SLICES for arm in ARMS]
    points += [(point, "train") for point in TRADES]
    for point, program in points:
        if point in stored(program):
            continue
        words = command(*point, program)
        print(" ".join(words), flush=True)
        with tempfile.NamedTemporaryFile("r") as out:
            words = [sys.executable, *words[1:], f"--out={out.name}"]
            subprocess.run(words, cwd=ROOT, check=True)
            result = json.loads(out.read())
        arm, *_, changes = point
        versions = {name: version(name) for name in ("jax", "libtpu")}
        with RESULTS.open("a") as file:
            line = {"arm": arm, "program": program, "changes": changes, **result, **versions}
            file.write(json.dumps(line) + "\n")


def executed_flops(arm: str, changes: tuple[str, ...]) -> float:
    """FLOPs of a step's matrix products, recomputed ones included, over the model's own."""
    config = runpy.run_path(str(ROOT / "configs/multilingual.py"))["get_config"](arm)
    config.encoder.path = str(SHAPES / "whisper-large-v3")
    config.llm.path = str(SHAPES / "qwen2.5-7b")
    config.batch_size, config.attention = 1, "xla"
    config.mesh.data = config.mesh.fsdp = 1
    for change in changes:
        key, _, value = change.partition("=")
        value = value if isinstance(config[key], str) else ast.literal_eval(value)
        config.update_from_flattened_dict({key: value})
    devices = aot.devices_of("cpu:1")[:1]
    slm, step_of, arguments = aot.abstract_step(config, devices, 100 * SECONDS, TOKENS)
    plain = aot.model_flops(config, devices, 100 * SECONDS, TOKENS)
    return flops.count(step_of(slm), *arguments) / plain


def report_trades(results: dict[tuple, dict]) -> str:
    """The table of what trades memory for time; FLOPs are counted anew."""
    rows = [
        "| slice | training | set | batch | frozen weights | activations, gradients, buffers | "
        "peak | of | FLOPs with recomputation |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    executed = functools.cache(executed_flops)
    groups = dict.fromkeys(point[:3] for point in TRADES)
    for group in groups:
        for point in [(*group, LEAN), *(point for point in TRADES if point[:3] == group)]:
            if point not in results:
                continue
            line, (arm, topology, _, changes) = results[point], point
            memory = line["memory"]
            rows.append(
                f"| {topology} | {ARMS[arm]} | {', '.join(changes)} | {line['batch_size']} | "
                f"{gib(memory['frozen weights'])} | "
                f"{gib(memory['activations, gradients, buffers'])} | {gib(line['peak'])} | "
                f"{gib(line['capacity'])} | {executed(arm, changes):.2f} x |"
            )
    return "\n".join(rows)


def measure_cpu() -> None:
    """Compiles the 60M step for CPU devices, changing one thing at a time."""
    base = {"devices": 8, "batch": 64, "seconds": 8, "vocabulary": 32_000}
    points = [base | {"devices": n} for n in (1, 2, 4)]
    points += [base] + [base | {"batch": n} for n in (16, 32)]
    points += [base | {"seconds": n} for n in (4, 16)]
    points += [base | {"vocabulary": n} for n in (1000, 152_000)]
    devices, lines = aot.devices_of("cpu:8"), []
    for point in points:
        config, _, tokens = recipe("60m", attention="xla")
        config.batch_size = point["batch"]
        with tempfile.TemporaryDirectory() as folder:
            shape = json.loads((SHAPES / "qwen2-60m/config.json").read_text())
            shape["vocab_size"] = point["vocabulary"]
            (Path(folder) / "config.json").write_text(json.dumps(shape))
            config.llm.path = folder
            found = aot.compile_step(
                config, devices[: point["devices"]], 100 * point["seconds"], tokens
            )
        lines.append(point | {"tokens": tokens} | dataclasses.asdict(found))
        print(point, f"{found.peak / GIB:.3f} GiB a device")
    CPU_RESULTS.write_text(json.dumps({"jax": version("jax"), "lines": lines}, indent=1) + "\n")


def gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def collectives(line: dict, unit: int) -> str:
    """kind times, bytes in `unit`; ..."""
    return "; ".join(
        f"{kind} {times}, {size / unit:.1f}" for kind, (times, size) in line["collectives"].items()
    )


def report_cpu() -> tuple[str, int]:
    """The table of the CPU sweep, and its transcripts' tokens."""
    lines = json.loads(CPU_RESULTS.read_text())["lines"]
    rows = [
        "| devices | batch | audio s | vocabulary | FLOPs a device | peak GiB a device | "
        "collectives (times, MiB) |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    for line in lines:
        rows.append(
            f"| {line['devices']} | {line['batch']} | {line['seconds']} | {line['vocabulary']:,} | "
            f"{line['flops'] / line['devices']:.3g} | {line['peak'] / GIB:.3f} | "
            f"{collectives(line, 2**20) or 'none'} |"
        )
    return "\n".join(rows), lines[0]["tokens"]


def report_decode() -> str:
    """The table of what evaluation needs."""
    rows = [
        "| slice | training | batch | frozen weights | trained weights | keys and values | "
        "activations, buffers | peak | of | host, while it loads | "
        "collectives of the prompt and one token (times, GiB) |",
        "|---|---|" + "---:|" * 8 + "---|",
    ]
    for (arm, topology, _, _), line in stored("decode").items():
        sizes = [*(size for part, size in line["memory"].items() if part != "batch")]
        sizes += [line["peak"], line["capacity"], line["host"]]
        rows.append(
            f"| {topology} | {ARMS[arm]} | {line['batch_size']} | {' | '.join(map(gib, sizes))} | "
            f"{collectives(line, GIB)} |"
        )
    return "\n".join(rows)


def report() -> str:
    """docs/scaling.md, every figure from the results."""
    results = stored()
    if not results:
        sys.exit(f"{RESULTS}: no results yet; run python -m benchmarks.scaling")
    parts = list(next(iter(results.values()))["memory"])
    memory = [
        "| slice | training | batch | " + " | ".join(parts) + " | peak | of | fits |",
        "|---|---|" + "---:|" * (len(parts) + 4),
    ]
    cost = [
        "| slice | training | model FLOPs a chip | seconds at peak | collectives (times, GiB) |",
        "|---|---|---:|---:|---|",
    ]
    for (arm, topology, slices, changes), line in results.items():
        if changes != LEAN:
            continue
        name = f"{slices} x {topology}" if slices > 1 else topology
        sizes = " | ".join(gib(line["memory"][part]) for part in parts)
        memory.append(
            f"| {name} | {ARMS[arm]} | {line['batch_size']} | {sizes} | {gib(line['peak'])} | "
            f"{gib(line['capacity'])} | {'yes' if line['peak'] <= line['capacity'] else 'no'} |"
        )
        chip = next(c for regex, c in flops.CHIPS if re.search(regex, SLICES[topology, slices][0]))
        each = line["flops"] / line["devices"]
        cost.append(
            f"| {name} | {ARMS[arm]} | {each:.3g} | {each / chip.flops:.2f} | "
            f"{collectives(line, GIB) or 'not known: does not fit'} |"
        )
    cpu, cpu_tokens = report_cpu()
    any_line = next(iter(results.values()))
    return TEMPLATE.format(
        seconds=SECONDS,
        tokens=TOKENS,
        positions=any_line["positions"],
        jax=any_line["jax"],
        libtpu=any_line["libtpu"],
        memory="\n".join(memory),
        cost="\n".join(cost),
        trades=report_trades(results),
        decode=report_decode(),
        decoded_tokens=DECODED_TOKENS,
        cpu=cpu,
        cpu_tokens=cpu_tokens,
        command=" ".join(command("otreg", "v5p:4x4x4", 1, LEAN)).replace(" --", " \\\n    --"),
    )


TEMPLATE = """# Scale, on paper

<!-- Written by python -m benchmarks.scaling --report from benchmarks/results/scaling.jsonl. -->

`python -m otreg_jax.aot` compiles the real training step (loss, OTReg, gradients, optimizer,
donated state) for devices that are not there. These are its figures for `configs/multilingual.py`,
Whisper-large-v3 + Qwen2.5-7B, with utterances of {seconds} s and {tokens} tokens (LLM sequences of
{positions} positions); jax {jax}, libtpu {libtpu}. No step was run:
memory and collectives are the compiler's, FLOPs are those of the traced program's matrix products,
without recomputation, and "seconds at peak" is FLOPs over the chip's data-sheet rate: a bound that
no real step reaches.

## Memory of one chip, GiB

{memory}

The batches are chosen, not the largest that fit: `--largest_batch` searches these and was not run
here. A chip of tpu7x is two devices, and its figures here and below are those of one.

## What a step costs

{cost}

Collectives are counted on one chip with loops multiplied out; bytes are those of the results.

## Memory or time

GiB a chip. `remat` says what of each layer the backward pass finds kept: nothing but its input
(`full`, in the tables above), the products with weights too (`dots`, which the recipes set),
everything (`none`). `frozen_int8` keeps frozen kernels in int8; `ctc.weight` is the CTC loss of the
recipes, which the tables above do without. FLOPs are those of all matrix products that are
executed, over the model's own with the same losses.

{trades}

## Evaluation

GiB a chip of what evaluation runs on a batch (`--program=decode`): the encoder, the prompt, and
greedy search for up to {decoded_tokens} tokens, on the mesh of training. Weights are where training
has them; a host holds little of them while it loads.

{decode}

## What grows with what

The same for a 60M model (Whisper-tiny and an 8-layer Qwen2, adapter and LoRA trained, OTReg on
layer 1, {cpu_tokens} tokens, float32) on CPU devices, data parallel, one thing changed at a time:

{cpu}

With a large vocabulary the logits exist a few positions at a time (see `losses/common.py`).

## Again, or for your model

```
{command}
```

`--topology=cpu:8` does the same without libtpu for a host with 8 CPU devices. Weights are never
read: a directory with a `config.json` is enough for `encoder.path` and `llm.path`.
"""


def main(argv):
    del argv
    if not (_REPORT.value or _CPU.value):
        measure()
    if _CPU.value:
        measure_cpu()
    DOCUMENT.write_text(report())
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    app.run(main)
