"""Sinkhorn side by side: our backends, ott-jax, POT and geomloss; and what OTReg adds to its cost.

    python -m benchmarks.sinkhorn
    python -m benchmarks.sinkhorn --size=B16xS375xT64 --repeats=21
    taskset -c 0 python -m benchmarks.sinkhorn --clock=cpu    # on a machine with other work to do

Needs the `bench` extra. Every solver gets the same costs in float32, runs 50 iterations at epsilon
0.05 (ott's default mode stops by itself), and returns plans. All are timed in turn, round by round;
ratios are medians of the rounds' own ratios, so that other load on the machine hits both sides. The
error of a plan is its L1 distance from a converged float64 plan, and the excess of its cost over
that of the exact linear program (POT). Prints tables and writes benchmarks/results/sinkhorn.json.
"""

import functools
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import geomloss.ot
import jax
import jax.numpy as jnp
import numpy as np
import ot
import ot.batch
import torch
from absl import app, flags
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from benchmarks.common import describe_machine
from otreg_jax import flops, fused, otreg

_SIZES = flags.DEFINE_multi_string(
    "size", ["B64xS150xT32", "B16xS375xT64", "B16xS1500xT128"], "Problem sizes."
)
_REPEATS = flags.DEFINE_integer("repeats", 11, "Rounds of timing.")
_CLOCK = flags.DEFINE_enum(
    "clock", "wall", ["wall", "cpu"], "Wall-clock time, or CPU time of all threads."
)
_WIDTH = flags.DEFINE_integer("width", 1024, "Of the embeddings.")
_OUT = flags.DEFINE_string("out", "benchmarks/results/sinkhorn.json", "File of the results.")

EPSILON = 0.05
NUM_ITERS = 50
CHECKED = 2  # examples of a batch whose plans are compared with the exact ones


def make_embeddings(size, seed=0):
    """Speech [B, S, D] that follows text [B, T, D] in order, at a cosine of about 0.4."""
    batch, speech, text = size
    rng = np.random.default_rng(seed)
    text_BTD = rng.normal(size=(batch, text, _WIDTH.value)).astype(np.float32)
    spoken_BSD = text_BTD[:, np.arange(speech) * text // speech]
    noise_BSD = rng.normal(size=(batch, speech, _WIDTH.value)).astype(np.float32)
    return 0.4 * spoken_BSD + np.sqrt(1 - 0.4**2, dtype=np.float32) * noise_BSD, text_BTD


def compile_jax(function, *args):
    """(compiled function, temporary bytes) for arguments like these."""
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes


def solve_ott(cost_BST, a_BS, b_BT, **options):
    def solve(cost_ST, a_S, b_T):
        geom = geometry.Geometry(cost_matrix=cost_ST, epsilon=EPSILON)
        return sinkhorn.Sinkhorn(**options)(linear_problem.LinearProblem(geom, a_S, b_T)).matrix

    return jax.vmap(solve)(cost_BST, a_BS, b_BT)


def finished(plan_BST: torch.Tensor) -> torch.Tensor:
    if plan_BST.is_cuda:
        torch.cuda.synchronize()
    return plan_BST


def solve_pot_batch(*problem, method):
    cost_BST, a_BS, b_BT = map(torch.from_dlpack, problem)  # where JAX has them
    options = dict(max_iter=NUM_ITERS, tol=0, grad="detach", method=method)
    return finished(ot.batch.solve_batch(cost_BST, EPSILON, a_BS, b_BT, **options).plan)


def solve_pot_loop(*problem, method):
    options = dict(method=method, numItermax=NUM_ITERS, stopThr=0, warn=False)
    examples = zip(*(np.asarray(x) for x in problem), strict=True)
    return np.stack([ot.sinkhorn(a, b, cost, EPSILON, **options) for cost, a, b in examples])


def solve_geomloss(*problem):
    cost_BST, a_BS, b_BT = map(torch.from_dlpack, problem)
    solve = geomloss.ot.solve_batch
    return finished(solve(cost_BST, reg=EPSILON, a=a_BS, b=b_BT, max_iter=NUM_ITERS).plan)


def solvers(*problem):
    """{name: (function of costs and marginals that returns plans, temporary bytes or None)}."""
    ours = functools.partial(otreg.transport_plan, epsilon=EPSILON, num_iters=NUM_ITERS)
    fixed = dict(min_iterations=NUM_ITERS, max_iterations=NUM_ITERS, inner_iterations=NUM_ITERS)
    programs = {
        "ours, xla": functools.partial(ours, backend="xla"),
        "ours, pallas": functools.partial(ours, backend="pallas"),
        "ott, fixed, log": functools.partial(solve_ott, **fixed),
        "ott, fixed, kernel": functools.partial(solve_ott, lse_mode=False, **fixed),
        "ott, default": solve_ott,
    }
    if jax.default_backend() == "cpu":
        del programs["ours, pallas"]  # it would be interpreted
    return {name: compile_jax(program, *problem) for name, program in programs.items()} | {
        "POT batch, log (torch)": (functools.partial(solve_pot_batch, method="log_sinkhorn"), None),
        "POT batch, kernel (torch)": (functools.partial(solve_pot_batch, method="sinkhorn"), None),
        "POT loop, log (numpy)": (functools.partial(solve_pot_loop, method="sinkhorn_log"), None),
        "POT loop, kernel (numpy)": (functools.partial(solve_pot_loop, method="sinkhorn"), None),
        "geomloss batch (torch)": (solve_geomloss, None),
    }


def regularizers(speech_BSD, text_BTD):
    """Loss and gradient of OTReg and of its cost alone: {name: (function, bytes)}, arguments."""
    masks = np.ones(speech_BSD.shape[:2], bool), np.ones(text_BTD.shape[:2], bool)
    weight = np.float32(1 / (speech_BSD.shape[1] * text_BTD.shape[1]))

    def cost_alone(speech_BSD, text_BTD, *_):
        return weight * jnp.sum(otreg.pairwise_cost(speech_BSD, text_BTD)[1])

    def whole(backend, alpha, speech_BSD, text_BTD, *masks):
        options = dict(epsilon=EPSILON, num_iters=NUM_ITERS, backend=backend)
        refine = fused.refinement(alpha)
        out = otreg.regularizer(speech_BSD, text_BTD, *masks, refine=refine, **options)
        return out.loss, out.metrics

    args = jax.device_put((speech_BSD, text_BTD, *masks))
    programs = {"cost alone": jax.value_and_grad(cost_alone)}
    forms = {"xla": ("xla", 0.0), "ott": ("ott", 0.0), "xla, structure": ("xla", 0.5)}
    for name, form in forms.items():
        programs[f"OTReg, {name}"] = jax.value_and_grad(
            functools.partial(whole, *form), has_aux=True
        )
    return {name: compile_jax(program, *args) for name, program in programs.items()}, args


def measure(programs, args, repeats):
    """{name: seconds of every round}: all are called in turn, `repeats` times after a warm-up."""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[_CLOCK.value]
    seconds = {name: [] for name in programs}
    for round_index in range(repeats + 1):
        for name, (function, _) in programs.items():
            time.sleep(0.1)  # idle threads of the one before, torch's above all, spin for a while
            start = clock()
            jax.block_until_ready(function(*args))
            if round_index:
                seconds[name].append(clock() - start)
    return seconds


def ratio(numerator, denominator):
    return statistics.median(x / y for x, y in zip(numerator, denominator, strict=True))


def exact_plans(cost_BST, a_BS, b_BT):
    """[(converged entropic plan, exact linear program's cost)] of some examples, in float64."""
    plans = []
    for problem in zip(a_BS[:CHECKED], b_BT[:CHECKED], cost_BST[:CHECKED], strict=True):
        a_S, b_T, cost_ST = (x.astype(np.float64) for x in problem)
        a_S, b_T = a_S / a_S.sum(), b_T / b_T.sum()
        entropic_ST = ot.sinkhorn(a_S, b_T, cost_ST, EPSILON, numItermax=100_000, stopThr=1e-12)
        plans.append((entropic_ST, ot.emd2(a_S, b_T, cost_ST)))
    return plans


def benchmark_size(size, repeats):
    batch, speech, text = size
    speech_BSD, text_BTD = make_embeddings(size)
    cost_BST = np.asarray(jax.jit(otreg.pairwise_cost)(speech_BSD, text_BTD)[1])
    a_BS = np.full((batch, speech), 1 / speech, np.float32)
    b_BT = np.full((batch, text), 1 / text, np.float32)
    exact = exact_plans(cost_BST, a_BS, b_BT)

    problem = jax.device_put((cost_BST, a_BS, b_BT))
    programs = solvers(*problem)
    seconds = measure(programs, problem, repeats)
    solve = {}
    for name, (function, temporary) in programs.items():
        plan_BST = function(*problem)
        if isinstance(plan_BST, torch.Tensor):
            plan_BST = plan_BST.cpu()
        pairs = list(zip(np.asarray(plan_BST), exact, cost_BST, strict=False))
        solve[name] = {
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "times_ours": ratio(seconds[name], seconds["ours, xla"]),
            "temporary_mib": None if temporary is None else temporary / 2**20,
            "plan_l1_error": max(float(np.abs(p - e).sum()) for p, (e, _), _ in pairs),
            "excess_over_lp": max(float((p * c).sum() / lp - 1) for p, (_, lp), c in pairs),
        }

    programs, args = regularizers(speech_BSD, text_BTD)
    seconds = measure(programs, args, repeats)
    whole = {
        name: {
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "times_cost": ratio(seconds[name], seconds["cost alone"]),
            "temporary_mib": temporary / 2**20,
        }
        for name, (_, temporary) in programs.items()
    }
    return {"solve": solve, "forward_backward": whole}


def least_milliseconds(size) -> float | None:
    """What main memory alone allows a fused solver: costs read once, plans written once; None if
    the device's bandwidth is not known."""
    chip = flops.chip(jax.devices()[0])
    return chip and 1e3 * 2 * 4 * math.prod(size) / chip.bandwidth


def table(rows):
    """Rows as Markdown, the columns those of the first row."""
    columns = list(next(iter(rows.values())))
    lines = [
        "| | " + " | ".join(columns).replace("_", " ") + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        cells = ("–" if row[c] is None else f"{row[c]:.3g}" for c in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(_):
    # jax's buffers are read-only, which torch warns of
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    results = {
        "environment": describe_machine("ott-jax", "POT", "torch", "geomloss", "numpy"),
        "settings": {
            "epsilon": EPSILON,
            "num_iters": NUM_ITERS,
            "width": _WIDTH.value,
            "repeats": _REPEATS.value,
            "clock": _CLOCK.value,
        },
        "sizes": {},
        "least_milliseconds": {},
    }
    path = Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in _SIZES.value:
        size = [int(part[1:]) for part in name.split("x")]
        results["sizes"][name] = benchmark_size(size, _REPEATS.value)
        results["least_milliseconds"][name] = least_milliseconds(size)
        for part, rows in results["sizes"][name].items():
            print(f"\n{name}, {part.replace('_', ' + ')}\n\n{table(rows)}", flush=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    app.run(main)
