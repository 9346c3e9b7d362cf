"""Runs Sinkhorn's iterations on one example a program, on chip, all of them fused (Pallas).

XLA would read the kernel from main memory twice in every iteration. Here an example's tile of costs
is brought on chip once, padded to the shape the chip wants, and `otreg.absorbed_sinkhorn` runs on
it, the same lines as in the XLA backend. Of a tile that does not fit, blocks of speech positions
come on chip one after the other, once in every iteration: `streamed_sinkhorn`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton


class Chip(NamedTuple):
    """What a tile [T, S] has to look like, and how large it may be."""

    powers_of_2: bool  # both sizes
    largest_tile: int  # entries; larger ones are streamed
    block: int  # speech positions of a streamed block
    copies: bool  # the kernel itself copies a block on chip; else to read it is to copy it


# The whole kernel of 3 * 2**18 entries compiles for the smallest VMEM (v5e), that of 2**20 does
# not. Triton keeps a tile in registers, which spill above 2**15 entries.
TPU = Chip(powers_of_2=False, largest_tile=2**19, block=512, copies=True)
GPU = Chip(powers_of_2=True, largest_tile=2**15, block=64, copies=False)
INTERPRETED = TPU  # everywhere else, for tests


def solve(
    absorbed_sinkhorn,
    cost_BST: jax.Array,
    a_BS: jax.Array,
    b_BT: jax.Array,
    num_iters: int,
    speech_tau: float,
) -> jax.Array:
    """Plans [B, S, T] float32 for costs in units of epsilon and marginals; zero mass is padding.

    absorbed_sinkhorn: `otreg.absorbed_sinkhorn`, handed over since otreg.py may stand anywhere.
    XLA cannot split a kernel: with the batch sharded over devices, call under `jax.shard_map`, as
    `otreg.transport_plan` does.
    """
    on = functools.partial(_solve, absorbed_sinkhorn, num_iters=num_iters, speech_tau=speech_tau)
    return jax.lax.platform_dependent(
        cost_BST,
        a_BS,
        b_BT,
        tpu=functools.partial(on, TPU, compiler_params=pltpu.CompilerParams()),
        cuda=functools.partial(on, GPU, compiler_params=pltriton.CompilerParams(num_warps=16)),
        default=functools.partial(on, INTERPRETED, interpret=True),
    )


def _solve(absorbed_sinkhorn, chip, cost_BST, a_BS, b_BT, *, num_iters, speech_tau, **options):
    batch, speech_size, text_size = cost_BST.shape
    pad = _next_power_of_2 if chip.powers_of_2 else _next_multiple
    padded_s, padded_t = pad(speech_size, 128), pad(text_size, 8)
    is_streamed = padded_s * padded_t > chip.largest_tile
    if is_streamed:
        padded_s = _next_multiple(speech_size, chip.block)
    # Speech, the longer side, lies along the lanes; padding has no mass.
    pad_s, pad_t = (0, padded_s - speech_size), (0, padded_t - text_size)
    cost_BTS = jnp.pad(jnp.swapaxes(cost_BST, 1, 2), ((0, 0), pad_t, pad_s))
    a_B1S = jnp.pad(a_BS, ((0, 0), pad_s))[:, None]
    b_BT1 = jnp.pad(b_BT, ((0, 0), pad_t))[:, :, None]

    def block(*shape):
        return pl.BlockSpec((1, *shape), lambda b: (b, 0, 0))

    tile, scratch = block(padded_t, padded_s), []
    if is_streamed:
        kernel = functools.partial(_streamed, block=chip.block)
        if chip.copies:  # the tile stays in main memory
            tile = pl.BlockSpec(memory_space=pl.ANY)
            scratch = [pltpu.VMEM((padded_t, chip.block), jnp.float32)]
    else:
        kernel = functools.partial(_whole, absorbed_sinkhorn)
    plan_BTS = pl.pallas_call(
        functools.partial(kernel, num_iters=num_iters, speech_tau=speech_tau),
        grid=(batch,),
        in_specs=[tile, block(1, padded_s), block(padded_t, 1)],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(cost_BTS.shape, jnp.float32),
        scratch_shapes=scratch,
        name="sinkhorn",
        **options,
    )(cost_BTS, a_B1S, b_BT1)
    return jnp.swapaxes(plan_BTS[:, :text_size, :speech_size], 1, 2)


def _next_multiple(size, of):
    return pl.cdiv(size, of) * of


def _next_power_of_2(size, at_least):
    return max(pl.next_power_of_2(size), at_least)


def _whole(absorbed_sinkhorn, cost_ref, a_ref, b_ref, plan_ref, *, num_iters, speech_tau):
    def weighted_sum(kernel_BTS, weight, axis):
        return jnp.sum(kernel_BTS * weight, axis=axis, keepdims=True)

    plan_ref[...] = absorbed_sinkhorn(
        cost_ref[...],
        a_ref[...],
        b_ref[...],
        weighted_sum,
        num_iters=num_iters,
        speech_tau=speech_tau,
        speech_axis=2,
    )


def _streamed(cost_ref, a_ref, b_ref, plan_ref, *scratch, block, num_iters, speech_tau):
    num_blocks = a_ref.shape[2] // block
    example = pl.program_id(0) if scratch else 0
    at = lambda i: pl.ds(pl.multiple_of(i * block, block), block)

    def read(i):
        if scratch:
            pltpu.sync_copy(cost_ref.at[example, :, at(i)], scratch[0])
            return scratch[0][...], a_ref[0, :, at(i)]
        return cost_ref[0, :, at(i)], a_ref[0, :, at(i)]

    def write(i, plan_TS):
        if scratch:
            scratch[0][...] = plan_TS
            pltpu.sync_copy(scratch[0], plan_ref.at[example, :, at(i)])
        else:
            plan_ref[0, :, at(i)] = plan_TS

    streamed_sinkhorn(read, write, b_ref[0], num_blocks, num_iters, speech_tau)


def streamed_sinkhorn(read, write, b_T1, num_blocks, num_iters, speech_tau) -> None:
    """Sinkhorn's iterations over blocks of speech positions, of which only the text's potentials
    are kept: those of speech follow from them, block by block.

    An iteration takes one exponential an entry: with z = g - C and its largest value m_s over the
    text, sum_t exp(z - m) gives f_s, and exp(z - m) exp(f + m) = exp(f + g - C) is the plan so far,
    whose text marginal corrects g. Each row of that plan holds no more than a_s, and its text
    marginals are at least b_t / S; nothing overflows or vanishes.

    Args:
      read(i): costs [T, S'] in units of epsilon, speech marginals [1, S'] of block i < num_blocks.
      write(i, plan_TS): takes the plan of block i.
      b_T1: text marginals. Zero mass is padding, on both sides.
    """
    is_text_T1 = b_T1 > 0
    log_b_T1 = jnp.where(is_text_T1, jnp.log(b_T1), -jnp.inf)
    lowest = -1e30  # finite: a maximum over nothing must not meet infinity in a difference

    def first_column_sums(i, state):
        largest_T1, sum_T1 = state
        cost_TS, a_1S = read(i)
        z_TS = jnp.where(a_1S > 0, -cost_TS, -jnp.inf)
        new_T1 = jnp.maximum(largest_T1, jnp.max(z_TS, axis=1, keepdims=True))
        added_T1 = jnp.sum(jnp.exp(z_TS - new_T1), axis=1, keepdims=True)
        return new_T1, sum_T1 * jnp.exp(largest_T1 - new_T1) + added_T1

    def plan_so_far(i, g_T1):
        cost_TS, a_1S = read(i)
        z_TS = g_T1 - cost_TS
        m_1S = jnp.maximum(jnp.max(z_TS, axis=0, keepdims=True), lowest)
        kernel_TS = jnp.exp(z_TS - m_1S)
        log_sum_1S = jnp.log(jnp.sum(kernel_TS, axis=0, keepdims=True)) + m_1S
        f_1S = speech_tau * (jnp.log(a_1S) - log_sum_1S)
        return kernel_TS * jnp.where(a_1S > 0, jnp.exp(f_1S + m_1S), 0.0)

    def iterate(_, g_T1):
        def add(i, sum_T1):
            return sum_T1 + jnp.sum(plan_so_far(i, g_T1), axis=1, keepdims=True)

        sum_T1 = jax.lax.fori_loop(0, num_blocks, add, jnp.zeros_like(b_T1))
        return jnp.where(is_text_T1, g_T1 + log_b_T1 - jnp.log(sum_T1), -jnp.inf)

    start = (jnp.full_like(b_T1, lowest), jnp.zeros_like(b_T1))
    largest_T1, sum_T1 = jax.lax.fori_loop(0, num_blocks, first_column_sums, start)
    g_T1 = jnp.where(is_text_T1, log_b_T1 - largest_T1 - jnp.log(sum_T1), -jnp.inf)
    g_T1 = jax.lax.fori_loop(0, num_iters - 1, iterate, g_T1)
    jax.lax.fori_loop(0, num_blocks, lambda i, _: write(i, plan_so_far(i, g_T1)), None)
