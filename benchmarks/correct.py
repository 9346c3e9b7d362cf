"""Does this device compute what it should: kernels against XLA's own, bfloat16 against float32?

    python -m benchmarks.correct

Three things that differ from one device to the next: plans of the fused Sinkhorn kernel, tiles that
fit on chip and tiles that are streamed; values and gradients of flash attention (on a device that
has none, XLA's in bfloat16 stands in); a few training steps in bfloat16. Sizes go by the device.
Prints a line for each comparison as it is made, writes benchmarks/results/correct.json (also what
there is of it when it is stopped), and fails if a difference is over its limit. The limits: an L1
distance of 1e-4 between plans, as in tests/test_solvers.py; else a few times the 2^-8 to which
bfloat16 rounds.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.common import describe_machine, make_step, recipe
from otreg_jax import command, otreg
from otreg_jax.models import attention

_OUT = flags.DEFINE_string("out", "benchmarks/results/correct.json", "File of the results.")

PLAN_LIMIT, BFLOAT16_LIMIT = 1e-4, 2e-2
STEPS = 3

Comparison = tuple[str, float, float]  # what, its difference, the limit of it


def plans(sizes) -> Iterator[Comparison]:
    """The largest L1 distance of a kernel's plan from XLA's, for sizes (B, S, T)."""
    for batch, speech, text in sizes:
        rng = np.random.default_rng(speech)
        cost_BST = rng.uniform(size=(batch, speech, text)).astype(np.float32)
        valid_BS = np.arange(speech) < rng.integers(speech // 2, speech + 1, batch)[:, None]
        valid_BT = np.arange(text) < rng.integers(text // 2, text + 1, batch)[:, None]
        marginals = [
            (valid / valid.sum(axis=1, keepdims=True)).astype(np.float32)
            for valid in (valid_BS, valid_BT)
        ]
        for speech_tau in (1.0, 0.5):
            solve = functools.partial(
                otreg.transport_plan, epsilon=0.05, num_iters=50, speech_tau=speech_tau
            )
            ours, theirs = (
                np.asarray(jax.jit(functools.partial(solve, backend=backend))(cost_BST, *marginals))
                for backend in ("pallas", "xla")
            )
            distance = float(np.abs(ours - theirs).sum(axis=(1, 2)).max())
            name = f"fused Sinkhorn, B{batch} S{speech} T{text}, speech_tau {speech_tau}"
            yield name, distance, PLAN_LIMIT


@functools.partial(jax.jit, static_argnames=("kernel", "dtype", "is_causal"))
def attended(q, k, v, weight, length_B, *, kernel, dtype, is_causal):
    """Attention's values and the gradients of their product with `weight`, to q, k and v."""

    def attend(q, k, v):
        lengths = {} if is_causal else {"length_B": length_B}
        scale = q.shape[-1] ** -0.5
        return attention.attention(
            q, k, v, scale=scale, is_causal=is_causal, kernel=kernel, **lengths
        )

    values, pull = jax.vjp(attend, *(x.astype(dtype) for x in (q, k, v)))
    weight = weight.astype(dtype)
    return (jnp.where(weight == 0, 0, values), *pull(weight))


def flash_attention(sizes) -> Iterator[Comparison]:
    """The difference of flash attention from float32's, relative to the latter's norm, for sizes
    (B, L, heads, key/value heads, head_dim)."""
    for batch, length, heads, kv_heads, dim in sizes:
        rng = np.random.default_rng(length)
        shapes = [(batch, length, count, dim) for count in (heads, kv_heads, kv_heads, heads)]
        q, k, v, weight = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
        length_B = np.r_[length, rng.integers(length // 2, length, batch - 1)].astype(np.int32)
        weight[np.arange(length) >= length_B[:, None]] = 0  # what padding gets is undefined
        kernel = attention.choose_kernel("auto", None, dtype="bfloat16", head_dim=dim)
        for is_causal in (True, False):
            run = functools.partial(attended, q, k, v, weight, length_B, is_causal=is_causal)
            with jax.default_matmul_precision("highest"):
                exact = jax.device_get(run(kernel="xla", dtype="float32"))
            ours = jax.device_get(run(kernel=kernel, dtype="bfloat16"))
            how = "causal" if is_causal else "by length"
            names = ("values", "gradient of q", "gradient of k", "gradient of v")
            for name, a, b in zip(names, ours, exact, strict=True):
                difference = np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b)
                label = f"attention ({kernel}), L{length} H{heads}/{kv_heads}x{dim}, {how}: {name}"
                yield label, float(difference), BFLOAT16_LIMIT


def steps(size: str) -> Iterator[Comparison]:
    """The relative difference of the first losses in bfloat16 and in float32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config, frames, tokens = recipe(size)
        config.compute_dtype = dtype
        step, state, frozen, batch = make_step(config, frames, tokens)
        for i in range(STEPS):
            state, metrics = step(state, frozen, batch)
            found = jax.device_get(metrics)
            losses[dtype, i] = {name: float(found[name]) for name in ("ce", "ctc", "otreg")}
    for i in range(STEPS):
        for name, exact in losses["float32", i].items():
            difference = abs(losses["bfloat16", i][name] / exact - 1)
            yield f"step {i} of {size} in bfloat16: {name}", difference, BFLOAT16_LIMIT


def main(argv):
    del argv
    on_cpu = jax.default_backend() == "cpu"
    # On a GPU a tile that fits on chip, and two that are streamed; Whisper's heads, Qwen2.5's.
    tiles = [(2, 20, 6)] if on_cpu else [(16, 375, 64), (8, 1500, 128), (2, 3000, 256)]
    heads = [(2, 24, 4, 2, 16)] if on_cpu else [(4, 750, 20, 20, 64), (4, 260, 12, 2, 128)]
    result = {**describe_machine("flax"), "rows": {}}
    rows, started = result["rows"], time.perf_counter()
    checks = (steps("nano" if on_cpu else "60m"), flash_attention(heads), plans(tiles))
    for name, difference, limit in itertools.chain(*checks):
        good = difference <= limit
        seconds = time.perf_counter() - started
        rows[name] = {"difference": difference, "limit": limit, "good": good}
        mark = "  " if good else "! "
        print(f"{mark}{name:70} {difference:.2e}  ({limit})  {seconds:.0f} s", flush=True)
        Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")
    wrong = [name for name, row in rows.items() if not row["good"]]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(rows)} comparisons are over their limit")


if __name__ == "__main__":
    command.quiet_and_cached()
    app.run(main)
