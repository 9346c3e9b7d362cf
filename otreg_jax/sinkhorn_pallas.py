"""Runs a Sinkhorn solver on one tile per example, on chip, all iterations fused (Pallas).

The solver is `otreg.absorbed_sinkhorn`, the same lines as the XLA backend; this file only brings an
example's costs on chip, padded to the shape the chip wants, and takes the plan back:
XLA would read the kernel from main memory twice in every iteration.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


def solve_tiles(solve, cost_BST: jax.Array, a_BS: jax.Array, b_BT: jax.Array) -> jax.Array:
    """Plans [B, S, T] of `solve(cost [1, T', S'], a [1, 1, S'], b [1, T', 1])`, S' and T' padded.

    The longer side, speech, lies along the lanes. Padding has zero mass, so it changes nothing.
    TPU: the tile and its kernel must fit VMEM. GPU: they live in registers, so S' * T' up to 32768.
    Anywhere else the kernel is interpreted: for tests.

    In a sharded program call it under `jax.shard_map` over the batch: a kernel is opaque to XLA's
    partitioner.
    """
    return jax.lax.platform_dependent(
        cost_BST, a_BS, b_BT,
        tpu=functools.partial(_call, solve, _next_multiple, False),
        cuda=functools.partial(_call, solve, _next_power_of_2, False),
        default=functools.partial(_call, solve, _next_multiple, True),
    )  # fmt: skip


def _next_multiple(size, of):
    return pl.cdiv(size, of) * of


def _next_power_of_2(size, at_least):
    return max(pl.next_power_of_2(size), at_least)


def _call(solve, pad, interpret, cost_BST, a_BS, b_BT):
    batch, speech_size, text_size = cost_BST.shape
    padded_t, padded_s = pad(text_size, 8), pad(speech_size, 128)
    pad_t, pad_s = padded_t - text_size, padded_s - speech_size
    cost_BTS = jnp.pad(jnp.swapaxes(cost_BST, 1, 2), ((0, 0), (0, pad_t), (0, pad_s)))
    a_B1S = jnp.pad(a_BS, ((0, 0), (0, pad_s)))[:, None]
    b_BT1 = jnp.pad(b_BT, ((0, 0), (0, pad_t)))[:, :, None]

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
        interpret=interpret,
        name="sinkhorn",
    )(cost_BTS, a_B1S, b_BT1)
    return jnp.swapaxes(plan_BTS[:, :text_size, :speech_size], 1, 2)
