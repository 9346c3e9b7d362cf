"""The whole training step with and without OTReg, over model sizes: time, MFU, memory, share.

    python -m benchmarks.step                          # what a CPU can run; the others on paper
    python -m benchmarks.step --size=1.5b --size=7b    # on an accelerator
    python -m benchmarks.step --sweep=batch --sweep=seconds
    taskset -c 0 python -m benchmarks.step --clock=cpu     # on a machine with other work to do

Adapter and LoRA train, encoder and LLM are frozen, as in configs/librispeech.py; weights are
random. Steps with and without OTReg are timed in turn, round by round; shares are medians of the
rounds' own ratios, so that other load on the machine hits both. Without --size, sizes that are not
run are counted: FLOPs of the traced step's matrix products. Prints tables and writes
benchmarks/results/step.json.
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


def share_on_paper(size: str, **changes) -> tuple[int, float]:
    """(model FLOPs of a step with OTReg, the part of them that OTReg adds)."""
    counted = []
    for otreg in (True, False):
        config, frames, tokens = recipe(size, otreg, "xla", **changes)
        config.mesh.data, config.mesh.fsdp = 1, 1
        counted.append(aot.model_flops(config, jax.devices()[:1], frames, tokens))
    return counted[0], 1 - counted[1] / counted[0]


def measure(size: str, repeats: int, attention: str, **changes) -> dict:
    """Times both steps in turn."""
    now = time.process_time if _CLOCK.value == "cpu" else time.perf_counter
    runs, chip = {}, flops_lib.chip(jax.devices()[0])
    for otreg in (True, False):
        config, frames, tokens = recipe(size, otreg, attention, **changes)
        step, state, frozen, batch = make_step(config, frames, tokens)
        runs[otreg] = [step, state, frozen, batch, []]
    for round in range(-2, repeats):  # the first ones compile and warm up
        for run in runs.values():
            step, state, frozen, batch, times = run
            start = now()
            run[1], metrics = step(state, frozen, batch)
            jax.block_until_ready((run[1], metrics))
            if round >= 0:
                times.append(now() - start)
    seconds = {otreg: statistics.median(run[4]) for otreg, run in runs.items()}
    flops, share = share_on_paper(size, **changes)
    shares = [1 - b / a for a, b in zip(runs[True][4], runs[False][4], strict=True)]
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "size": size,
        **changes,
        "batch_size": config.batch_size,
        "frames": frames,
        "tokens": tokens,
        "seconds": seconds[True],
        "seconds_without": seconds[False],
        "share": statistics.median(shares),
        "flops": flops,
        "flops_share": share,
        "flops_per_sec": flops / seconds[True],
        "mfu": chip and flops / seconds[True] / chip.flops / jax.device_count(),
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
        f"{'size':12}{'batch':>6}{'audio s':>8}{'ms':>9}{'OTReg':>8}{'of FLOPs':>9}"
        f"{'GFLOP/s':>9}{'MFU':>7}"
    )
    for size, changes in points:
        row = measure(size, _REPEATS.value, _ATTENTION.value, **changes)
        rows.append(row)
        mfu = "" if row["mfu"] is None else f"{row['mfu']:7.1%}"
        print(
            f"{size:12}{row['batch_size']:6}{row['frames'] / 100:8.1f}{1e3 * row['seconds']:9.1f}"
            f"{row['share']:8.1%}{row['flops_share']:9.2%}{row['flops_per_sec'] / 1e9:9.1f}{mfu}"
        )
    for size in known if not _SIZES.value else ():
        if size not in sizes:
            flops, share = share_on_paper(size)
            rows.append({"size": size, "flops": flops, "flops_share": share})
            print(f"{size:12} on paper: {flops:.3g} FLOPs a step, OTReg {share:.3%} of them")
    settings = {"repeats": _REPEATS.value, "clock": _CLOCK.value}
    result = {**describe_machine("flax"), **settings, "rows": rows}
    Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    command.quiet_and_cached()
    app.run(main)
