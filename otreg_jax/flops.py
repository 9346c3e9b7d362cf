"""What a program computes, and what chips can: FLOPs of matrix products, peak rates, memory.

FLOPs are counted in the traced program, so that frozen weights, LoRA, micro-batches and every
model option are counted as they are. Attention counts in full, its masked half included.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.extend import core


class Chip(NamedTuple):
    """One device as JAX counts them, after its maker's data sheet.

    flops: bfloat16 matrix products, dense, FLOP/s. memory: bytes. bandwidth: of it, bytes/s.
    """

    flops: float
    memory: float
    bandwidth: float


# The first regex found in `device_kind` decides. JAX counts each half of a TPU7x (Ironwood: two
# chiplets, 2307 TFLOP/s, 192 GiB, 7.38 TB/s) as a device.
CHIPS = (
    (r"TPU v4", Chip(275e12, 32 * 2**30, 1.2e12)),
    (r"TPU v5 lite|TPU v5e", Chip(197e12, 16 * 2**30, 0.82e12)),
    (r"TPU v5", Chip(459e12, 95 * 2**30, 2.77e12)),
    (r"TPU v6", Chip(918e12, 32 * 2**30, 1.64e12)),
    (r"TPU ?v?7", Chip(2307e12 / 2, 96 * 2**30, 7.38e12 / 2)),
    (r"A100.*80GB", Chip(312e12, 80 * 2**30, 2.0e12)),
    (r"A100", Chip(312e12, 40 * 2**30, 1.6e12)),
    (r"H200", Chip(989e12, 141e9, 4.8e12)),
    (r"H100", Chip(989e12, 80 * 2**30, 3.35e12)),
    (r"GB200", Chip(2500e12, 186e9, 8.0e12)),
    (r"B200", Chip(2250e12, 180e9, 8.0e12)),
    (r"L40S", Chip(362e12, 48e9, 0.864e12)),
)


def chip(device) -> Chip | None:
    """The chip of a device; None if it is not known here (CPUs have no one peak)."""
    return next((c for regex, c in CHIPS if re.search(regex, device.device_kind)), None)


def count(fn, *args) -> int:
    """FLOPs of the matrix products and convolutions of `fn(*args)`, over all devices.

    Args:
      fn: a function that JAX can trace, jitted or not.
      args: its arguments, arrays or ShapeDtypeStructs; nothing is computed.

    A loop counts as often as it runs where the program says how often, else once; of several
    branches the most expensive one counts.
    """
    return of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def of_batches(step_fn, state, frozen) -> Callable[[dict], int]:
    """A function from a batch (global arrays) to the FLOPs of its step; every shape is traced once.

    Give it the step of `build.plain`: model FLOPs leave out what recomputation adds.
    """
    known = {}

    def of_batch(batch):
        shapes = tuple((name, x.shape) for name, x in sorted(batch.items()))
        if shapes not in known:
            known[shapes] = count(step_fn, state, frozen, batch)
        return known[shapes]

    return of_batch


def of_jaxpr(jaxpr) -> int:
    """`count` of what is traced already."""
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        out_features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # The gradient of a strided convolution runs over zeros put between its inputs.
        zeros = math.prod(params["lhs_dilation"])
        return 2 * equation.outvars[0].aval.size * kernel.size // out_features // zeros
    inner = [of_jaxpr(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    times = {
        "scan": lambda: params["length"],
        "shard_map": lambda: math.prod(params["mesh"].shape[a] for a in params["manual_axes"]),
        "pallas_call": lambda: math.prod(params["grid_mapping"].grid),
    }
    return sum(inner) * (times[name]() if name in times else 1)


def _jaxprs(value):
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, (tuple, list)):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []
