"""The whole training step with and without OTReg and CTC, over model sizes: time, MFU, memory.

    python -m benchmarks.step                          # what a CPU can run; the others on paper
    python -m benchmarks.step --size=1.5b --size=7b    # on an accelerator
    python -m benchmarks.step --sweep=batch --sweep=seconds
    taskset -c 0 python -m benchmarks.step --clock=cpu     # on a machine with other work to do

Adapter and LoRA train, encoder and LLM are frozen, as in configs/librispeech.py; weights are
random. Steps with all losses, without OTReg and with cross-entropy alone are timed in turn, round
by round; shares are medians of the rounds' own ratios, so that other load on the machine hits all.
CTC's is an upper bound: its classes are the whole vocabulary here, in training the tokens in use.
Without --size, sizes that are not run are counted: FLOPs of the traced step's matrix products.
Prints tables and writes benchmarks/results/step.json.
"""

import json
import statistics
import time
from pathlib import Path

import jax
from absl import app, flags

from benchmarks.common import SIZES, describe_machine, make_step, recipe
from otreg_jax import aot, command
from otreg_jax import flops as flops_lib

SWEEPS = {"batch": (4, 8, 16), "seconds": (4.0, 8.0, 16.0)}  # around the smaller sizes

_SIZES = flags.DEFINE_multi_enum("size", [], list(SIZES), "Sizes to run; default: by the device.")
_SWEEPS = flags.DEFINE_multi_enum("sweep", [], list(SWEEPS), "Also vary this, at the first size.")
_ATTENTION = flags.DEFINE_string("attention", "auto", "As config.attention.")
_REPEATS = flags.DEFINE_integer("repeats", 11, "Rounds of timing.")
_CLOCK = flags.DEFINE_enum(
    "clock", "wall", ["wall", "cpu"], "Wall-clock time, or CPU time of all threads."
)
_OUT = flags.DEFINE_string("out", "benchmarks/results/step.json", "File of the results.")


ARMS = ("otreg", "ctc", "ce")  # of `recipe`: each has one loss less


def shares(otreg, ctc, ce) -> dict[str, float]:
    """The parts of a step's cost that OTReg and CTC are, from the costs of the three arms."""
    return {"otreg": (otreg - ctc) / otreg, "ctc": (ctc - ce) / otreg}


def on_paper(size: str, **changes) -> dict:
    """Model FLOPs of a step with all losses, and the shares of them."""
    counted = []
    for arm in ARMS:
        config, frames, tokens = recipe(size, arm, "xla", **changes)
        config.mesh.data, config.mesh.fsdp = 1, 1
        counted.append(aot.model_flops(config, jax.devices()[:1], frames, tokens))
    return {"flops": counted[0], "flops_share": shares(*counted)}


def measure(size: str, repeats: int, attention: str, **changes) -> dict:
    """Times the steps of all arms in turn."""
    now = time.process_time if _CLOCK.value == "cpu" else time.perf_counter
    runs, chip = [], flops_lib.chip(jax.devices()[0])
    for arm in ARMS:
        config, frames, tokens = recipe(size, arm, attention, **changes)
        runs.append([*make_step(config, frames, tokens), []])
    for round in range(-2, repeats):  # the first ones compile and warm up
        for run in runs:
            step, state, frozen, batch, times = run
            start = now()
            run[1], metrics = step(state, frozen, batch)
            jax.block_until_ready((run[1], metrics))
            if round >= 0:
                times.append(now() - start)
    rounds = [shares(*times) for times in zip(*(run[4] for run in runs), strict=True)]
    seconds = [statistics.median(run[4]) for run in runs]
    counted = on_paper(size, **changes)
    per_second = counted["flops"] / seconds[0]
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "size": size,
        **changes,
        "batch_size": config.batch_size,
        "frames": frames,
        "tokens": tokens,
        "seconds": dict(zip(ARMS, seconds, strict=True)),
        "share": {name: statistics.median(x[name] for x in rounds) for name in rounds[0]},
        **counted,
        "flops_per_sec": per_second,
        "mfu": chip and per_second / chip.flops / jax.device_count(),
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }


def main(argv):
    del argv
    on_cpu = jax.default_backend() == "cpu"
    known = [size for size in SIZES if size != "nano"]
    sizes = _SIZES.value or (["quickstart", "60m"] if on_cpu else known)
    points = [(size, {}) for size in sizes]
    points += [(sizes[-1], {name: value}) for name in _SWEEPS.value for value in SWEEPS[name]]
    rows = []
    print(
        f"{'size':12}{'batch':>6}{'audio s':>8}{'ms':>9}{'OTReg':>8}{'CTC':>8}{'of FLOPs':>15}"
        f"{'GFLOP/s':>11}{'MFU':>7}"
    )
    both = lambda shares: f"{shares['otreg']:8.2%}{shares['ctc']:7.2%}"
    for size, changes in points:
        row = measure(size, _REPEATS.value, _ATTENTION.value, **changes)
        rows.append(row)
        mfu = "" if row["mfu"] is None else f"{row['mfu']:7.1%}"
        print(
            f"{size:12}{row['batch_size']:6}{row['frames'] / 100:8.1f}"
            f"{1e3 * row['seconds']['otreg']:9.1f}{row['share']['otreg']:8.1%}"
            f"{row['share']['ctc']:8.1%}{both(row['flops_share'])}"
            f"{row['flops_per_sec'] / 1e9:11.1f}{mfu}"
        )
    for size in known if not _SIZES.value else ():
        if size not in sizes:
            rows.append({"size": size, **on_paper(size)})
            print(
                f"{size:12} on paper: {rows[-1]['flops']:.3g} FLOPs{both(rows[-1]['flops_share'])}"
            )
    settings = {"repeats": _REPEATS.value, "clock": _CLOCK.value}
    result = {**describe_machine("flax"), **settings, "rows": rows}
    Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    command.quiet_and_cached()
    app.run(main)
