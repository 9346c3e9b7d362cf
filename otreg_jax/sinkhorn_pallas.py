"""Runs a Sinkhorn solver on one tile per example, on chip, all iterations fused (Pallas).

The solver is `otreg.absorbed_sinkhorn`, the same lines as the XLA backend. This file only brings an
example's costs on chip, padded to the shape the chip wants, and takes the plan back: XLA would read
the kernel from main memory twice in every iteration.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton


def solve_tiles(solve, cost_BST: jax.Array, a_BS: jax.Array, b_BT: jax.Array) -> jax.Array:
    """Plans [B, S, T] float32 of `solve(cost [1, T', S'], a [1, 1, S'], b [1, T', 1])`.

    S' and T' are S and T padded, by positions without mass. Speech, the longer side, lies along the
    lanes. On a TPU (Mosaic) the tile and its kernel live in VMEM, on a GPU (Triton) in registers,
    which spill above about S' T' = 32768. Elsewhere the kernel is interpreted, for tests.

    XLA cannot split a kernel: with the batch sharded over devices, call under `jax.shard_map`.
    """
    call = functools.partial(_call, solve)
    return jax.lax.platform_dependent(
        cost_BST, a_BS, b_BT,
        tpu=functools.partial(call, _next_multiple, compiler_params=pltpu.CompilerParams()),
        cuda=functools.partial(
            call, _next_power_of_2, compiler_params=pltriton.CompilerParams(num_warps=16)
        ),
        default=functools.partial(call, _next_multiple, interpret=True),
    )  # fmt: skip


def _next_multiple(size, of):
    return pl.cdiv(size, of) * of


def _next_power_of_2(size, at_least):
    return max(pl.next_power_of_2(size), at_least)


def _call(solve, pad, cost_BST, a_BS, b_BT, **options):
    batch, speech_size, text_size = cost_BST.shape
    padded_s, padded_t = pad(speech_size, 128), pad(text_size, 8)
    pad_s, pad_t = (0, padded_s - speech_size), (0, padded_t - text_size)
    cost_BTS = jnp.pad(jnp.swapaxes(cost_BST, 1, 2), ((0, 0), pad_t, pad_s))
    a_B1S = jnp.pad(a_BS, ((0, 0), pad_s))[:, None]
    b_BT1 = jnp.pad(b_BT, ((0, 0), pad_t))[:, :, None]

    def kernel(cost_ref, a_ref, b_ref, plan_ref):
        plan_ref[...] = solve(cost_ref[...], a_ref[...], b_ref[...])

    def block(*shape):
        return pl.BlockSpec((1, *shape), lambda b: (b, 0, 0))

    plan_BTS = pl.pallas_call(
        kernel,
        grid=(batch,),
        in_specs=[block(padded_t, padded_s), block(1, padded_s), block(padded_t, 1)],
        out_specs=block(padded_t, padded_s),
        out_shape=jax.ShapeDtypeStruct(cost_BTS.shape, jnp.float32),
        name="sinkhorn",
        **options,
    )(cost_BTS, a_B1S, b_BT1)
    return jnp.swapaxes(plan_BTS[:, :text_size, :speech_size], 1, 2)
