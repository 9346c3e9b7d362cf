"""Packing: utterances of a batch are read one behind the other, with no padding between.

    unpacked [B, L]        packed [R, W]
    a a a a . .            a a a a b b c c c c c c d d d .
    b b . . . .
    c c c c c c
    d d d . . .

All of the LLM, and of Whisper's encoder, that looks at one position alone (norms, projections,
MLPs: nearly all of their FLOPs) runs on packed rows. Attention, and what else looks at several
positions, gets each utterance in a row of its own again: so nothing is seen across utterances
without any mask, positions count from each utterance's start, attention costs no more than before,
and every kernel, window and linear layer computes as it did. This is the padding removal of
ByteTransformer (Zhai et al. 2023, arXiv 2210.03052), with shapes that XLA can compile: utterances
are dealt to rows so that all are about as full, and a row of a bucket has as many slots as the
fullest one of the first epoch, and a few.

The batch's "segments" say what lies where in the LLM's rows, its "encoder_segments" in the
encoder's. There is a packed row for each part that the batch is cut into: for each device that has
rows of it, and each micro-batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = 64  # sizes of rows between a power of two and the next
FURTHER_SHAPES = 8  # likewise, of rows that turn out too short: each is compiled in mid-run

# ------------------------------------------------------------------------------------------------
# On the host: which utterances share a row, and how long rows are
# ------------------------------------------------------------------------------------------------


def pack(plan, length_KN: np.ndarray, rows: int, accumulation: int = 1, first: dict | None = None):
    """The plan with the draws of each bucket dealt anew: to batches of about as many positions, and
    those of a batch to its packed rows.

    Batches keep their sizes, buckets their draws; which of about the same length stay together is
    as random as their order is. The number of rows decides on the order in a batch alone. The
    plan's `slots_SK` says how long the rows of each batch are.

    Args:
      plan: a `data.bucketing.Plan`, all batches of a bucket of one size, a multiple of `rows`.
      length_KN: int [K, draws], positions of each draw, at most: in the LLM, which decides how they
        are dealt, and in whatever else is packed.
      rows: packed rows of a batch. accumulation: micro-batches that these rows are cut into.
      first: {bucket: slots [K]} of the first epoch, which others keep where they can.
    """
    order = np.arange(len(plan.rows))
    slots_SK = np.zeros((len(plan.bucket_S), len(length_KN)), int)
    for bucket in np.unique(plan.bucket_S):
        steps = np.flatnonzero(plan.bucket_S == bucket)
        size = plan.size_S[steps[0]]
        draws = (plan.start_S[steps, None] + np.arange(size)).ravel()
        draws_SB = draws[even_groups(length_KN[0][draws][None], size)[0]]
        rows_SRk = even_groups(length_KN[0][draws_SB], size // rows)
        draws_SRk = np.take_along_axis(draws_SB, rows_SRk.reshape(draws_SB.shape), axis=1)
        draws_SRk = draws_SRk.reshape(rows_SRk.shape)
        longest_K = length_KN[:, draws_SRk].sum(axis=3).max(axis=(1, 2)).tolist()
        known_K = (first or {}).get(bucket, [None] * len(longest_K))
        # The LLM's rows are as even as can be, others less so: they get twice the room.
        rooms_K = [1] + [2] * (len(longest_K) - 1)
        slots_SK[steps] = list(map(_slots, longest_K, known_K, rooms_K))
        # As `train_step.sum_over_micro_batches` cuts a batch: every so manieth utterance.
        cut = draws_SRk.reshape(-1, accumulation, size // rows).swapaxes(1, 2)
        order[draws] = cut.ravel()
    of_draws = (x[order] for x in (plan.rows, plan.speed, plan.repeated))
    return plan._replace(slots_SK=slots_SK, **dict(zip(plan._fields, of_draws, strict=False)))


def even_groups(length_SN: np.ndarray, count: int) -> np.ndarray:
    """For each set of lengths, groups of `count` of them that add up to about the same: their
    places, int [S, groups, count].

    The longest go one to a group, then the next ones, longest to shortest group, and so on.
    """
    parts = np.argsort(-length_SN, axis=1, kind="stable").reshape(len(length_SN), count, -1)
    parts[:, 0].sort(axis=1)  # else the first batches would be those of the longest
    total_SG, dealt = 0, []
    for part_SG in parts.swapaxes(0, 1):
        mine_SG = part_SG
        if dealt:
            mine_SG = np.empty_like(part_SG)
            np.put_along_axis(mine_SG, np.argsort(total_SG, axis=1, kind="stable"), part_SG, axis=1)
        total_SG = total_SG + np.take_along_axis(length_SN, mine_SG, axis=1)
        dealt.append(mine_SG)
    return np.stack(dealt, axis=2)


def _slots(longest: int, first: int | None, room: int) -> int:
    """Slots for rows of up to `longest` positions: `first`, if that will do; a little more, `room`
    times, for later epochs, if there is none yet."""
    if first and longest <= first:
        return first
    power = 2 ** (longest.bit_length() - 1)
    step = max(power // (FURTHER_SHAPES if first else SHAPES), 1)
    return (-(-longest // step) + (0 if first else room)) * step


def segments(length_B: np.ndarray, rows: int, slots: int, accumulation: int = 1) -> np.ndarray:
    """What lies in each slot of packed rows: int32 [rows, slots], which of its row's utterances, as
    `Packed` counts them; behind them their number. length_B: of the utterances, as `pack` orders
    them; 0 leaves one out."""
    length_Rk = length_B.reshape(-1, len(length_B) // rows, accumulation).swapaxes(1, 2)
    length_Rk = length_Rk.reshape(rows, -1)
    number_k = np.arange(length_Rk.shape[1])
    made = np.full((rows, slots), len(number_k), np.int32)
    for row, length_k in zip(made, length_Rk, strict=True):
        row[: length_k.sum()] = np.repeat(number_k, length_k)
    return made


def describe(plan, length_KN: np.ndarray, full_Kb: np.ndarray, rows: int, is_packed: bool) -> str:
    """How much of the positions in an epoch, or in some steps, is padding, packed and not.

    Args:
      plan: what `pack` makes of it, whatever is done. length_KN: as `pack` took it, or in this
        plan's order: its batches hold as much.
      full_Kb: positions of an unpacked row of each bucket.
    """
    before_KN = np.pad(length_KN, ((0, 0), (1, 0))).cumsum(axis=1)
    used_K = (before_KN[:, plan.start_S + plan.size_S] - before_KN[:, plan.start_S]).sum(axis=1)
    unpacked_K = 1 - used_K / (full_Kb[:, plan.bucket_S] * plan.size_S).sum(axis=1)
    packed_K = 1 - used_K / (rows * plan.slots_SK).sum(axis=0)
    now_K, other_K = (packed_K, unpacked_K) if is_packed else (unpacked_K, packed_K)
    whose = ("the LLM's positions", "the encoder's")[: len(used_K)]
    now = ", ".join(f"{x:.1%} of {name}" for x, name in zip(now_K, whose, strict=True))
    other = ", ".join(f"{x:.1%}" for x in other_K)
    return f"padding {now} ({other} with packing={not is_packed})"


# ------------------------------------------------------------------------------------------------
# On the device: there and back
# ------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Where B = R·k utterances of up to L positions lie in R rows of W slots; all int32.

    slot_RkL: the slot of each position; W: it is padding. Utterance s of row r is row r·k + s of
      the batch.
    source_RW: the inverse, s·L + l; k·L: nothing lies there.
    position_RW: l, for rotations.
    """

    slot_RkL: jax.Array
    source_RW: jax.Array
    position_RW: jax.Array


def packed(segments_RW: jax.Array, batch: int, length: int) -> Packed:
    """Where the utterances of a batch lie, of up to `length` positions; `segments` as above."""
    W, k = segments_RW.shape[1], batch // len(segments_RW)
    end_Rk = jnp.sum(segments_RW[:, None] <= jnp.arange(k)[None, :, None], axis=-1)
    start_Rk = jnp.pad(end_Rk, ((0, 0), (1, 0)))  # and, as that of number k, of what is empty
    position_RW = jnp.arange(W)[None] - jnp.take_along_axis(start_Rk, segments_RW, axis=1)
    is_used_RW = (segments_RW < k) & (position_RW < length)
    source_RW = jnp.where(is_used_RW, segments_RW * length + position_RW, k * length)
    slot_RkL = start_Rk[:, :k, None] + jnp.arange(length)[None, None]
    slot_RkL = jnp.where(slot_RkL < end_Rk[..., None], slot_RkL, W)
    return Packed(slot_RkL, source_RW, position_RW)


def lengths(packed: Packed) -> jax.Array:
    """Positions of each utterance: int32 [B]."""
    is_used_RkL = packed.slot_RkL < packed.source_RW.shape[1]
    return jnp.sum(is_used_RkL, axis=-1, dtype=jnp.int32).ravel()


def pack_rows(x_BL: jax.Array, packed: Packed | None) -> jax.Array:
    """[B, L, ...] -> [R, W, ...], zeros where nothing lies; as it is where `packed` is None."""
    if packed is None:
        return x_BL
    R, k, L = packed.slot_RkL.shape
    x_RN = x_BL.reshape(R, k * L, *x_BL.shape[2:])
    return _move(x_RN, packed.source_RW, packed.slot_RkL.reshape(R, k * L))


def unpack_rows(x_RW: jax.Array, packed: Packed | None) -> jax.Array:
    """[R, W, ...] -> [B, L, ...], zeros at padding; as it is where `packed` is None."""
    if packed is None:
        return x_RW
    R, k, L = packed.slot_RkL.shape
    x_RN = _move(x_RW, packed.slot_RkL.reshape(R, k * L), packed.source_RW)
    return x_RN.reshape(R * k, L, *x_RW.shape[2:])


def apart(fn: Callable, packed: Packed | None) -> Callable:
    """`fn` of arrays [B, L, ...] as a function of packed ones: each utterance in its own row."""
    if packed is None:
        return fn
    return lambda *xs: pack_rows(fn(*(unpack_rows(x, packed) for x in xs)), packed)


@jax.custom_vjp
def _move(x_RN: jax.Array, to_RM: jax.Array, back_RN: jax.Array) -> jax.Array:
    """x at `to` [R, M, ...], 0 where that is beyond x. `back` is the inverse of `to`: the gradient,
    by default a slow scatter, is the way back."""
    take = lambda x_N, to_M: x_N.at[to_M].get(mode="fill", fill_value=0)
    return jax.vmap(take)(x_RN, to_RM)


def _move_fwd(x_RN, to_RM, back_RN):
    return _move(x_RN, to_RM, back_RN), (to_RM, back_RN)


def _move_bwd(kept, gradient_RM):
    to_RM, back_RN = kept
    return _move(gradient_RM, back_RN, to_RM), None, None


_move.defvjp(_move_fwd, _move_bwd)
