"""Few shapes for utterances of every length, and the batches that fill them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from otreg_jax.data import features
from otreg_jax.data.utterances import Utterance

FRAMES_MULTIPLE = 8  # bucket widths, so that convolution strides and frame stacking divide them


class Corpus(NamedTuple):
    """Utterances with what batching needs to know about them, in the same order."""

    utterances: Sequence[Utterance]
    samples: np.ndarray  # int64 [N] at 16 kHz
    tokens: np.ndarray  # int32, all transcripts one after another
    ends: np.ndarray  # int64 [N], where each transcript ends in `tokens`

    @property
    def token_length(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def transcript(self, row: int) -> np.ndarray:
        return self.tokens[self.ends[row - 1] if row else 0 : self.ends[row]]


class Plan(NamedTuple):
    """The batches of an epoch."""

    rows_SB: np.ndarray  # int [steps, batch_size], rows of the corpus
    speed_SB: np.ndarray  # float, how many times as fast each is played
    repeated_SB: np.ndarray  # bool, whether the draw is one too many
    bucket_S: np.ndarray  # int, the shape of each batch


def make_corpus(utterances: Sequence[Utterance], tokenizer) -> Corpus:
    """Tokenizes the transcripts. Raises ValueError if there is no utterance."""
    if not utterances:
        raise ValueError("there are no utterances to batch")
    ids = [np.asarray(tokenizer.encode(u.text), np.int32) for u in utterances]
    return Corpus(
        utterances,
        np.array([round(u.duration * features.SAMPLE_RATE) for u in utterances]),
        np.concatenate(ids),
        np.cumsum([len(i) for i in ids], dtype=np.int64),
    )


def frames_of(samples_N: np.ndarray, speed=1.0) -> np.ndarray:
    """Mel frames of so many samples played `speed` times as fast."""
    return features.num_frames(np.ceil(samples_N / speed).astype(np.int64))


def choose_buckets(
    frames_N: np.ndarray, tokens_N: np.ndarray, num_buckets: int
) -> tuple[tuple[int, int], ...]:
    """The (frames, tokens) shapes that pad the least when every utterance goes to the narrowest.

    Exact, by dynamic programming over the distinct lengths. A shape's tokens are what its longest
    transcript needs, and never fewer than those of a narrower shape.

    Args:
      frames_N: int [N], mel frames of each utterance.
      tokens_N: int [N], transcript tokens of each utterance.
      num_buckets: how many shapes there may be; fewer come back if the lengths do not differ.

    Returns:
      ((frames, tokens), ...), both rising; frames are multiples of FRAMES_MULTIPLE.
    """
    rounded_N = -(-frames_N // FRAMES_MULTIPLE) * FRAMES_MULTIPLE
    widths, counts = np.unique(rounded_N, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # utterances narrower than widths[i]
    # padded[i, j]: frames of one bucket as wide as widths[j] that takes all from widths[i] on
    padded = (below[None, 1:] - below[:-1, None]) * widths.astype(float)
    padded[np.tril_indices(len(widths), -1)] = np.inf
    cost = np.concatenate([[0.0], np.full(len(widths), np.inf)])  # of the narrowest j widths
    starts = []
    for _ in range(min(num_buckets, len(widths))):
        total = cost[:-1, None] + padded
        starts.append(total.argmin(axis=0))
        cost = np.concatenate([[0.0], total.min(axis=0)])
    edges, end = [], len(widths)
    for start in reversed(starts):
        if end:
            edges.append(int(widths[end - 1]))
            end = int(start[end - 1])
    return tuple((edge, max(1, int(tokens_N[frames_N <= edge].max()))) for edge in edges[::-1])


def deal(corpus: Corpus, draws_N, speed_N, buckets, batch_size: int) -> Plan:
    """Deals draws, in order, into batches of one bucket each, narrow buckets first.

    The first draws are repeated as often as it takes to fill every batch.
    """
    dealt = np.arange(-(-len(draws_N) // batch_size) * batch_size)
    rows, speed = np.resize(draws_N, len(dealt)), np.resize(speed_N, len(dealt))
    frames, tokens = np.array(buckets).T
    bucket = np.maximum(
        np.searchsorted(frames, frames_of(corpus.samples[rows], speed)),
        np.searchsorted(tokens, corpus.token_length[rows]),
    )
    batches, bucket_S, left = [], [], dealt[:0]
    for b in range(len(buckets)):
        waiting = np.concatenate([left, dealt[bucket == b]])
        full = len(waiting) // batch_size * batch_size
        batches.append(waiting[:full])
        bucket_S += [b] * (full // batch_size)
        left = waiting[full:]
    dealt_SB = np.concatenate(batches).reshape(-1, batch_size)
    repeated_SB = dealt_SB >= len(draws_N)
    return Plan(rows[dealt_SB], speed[dealt_SB], repeated_SB, np.array(bucket_S))


def padding(corpus: Corpus, buckets, plan: Plan) -> tuple[float, float]:
    """The fractions of frames and of tokens in an epoch's batches that are padding."""
    frames, tokens = np.array(buckets).T
    frames_SB = frames_of(corpus.samples[plan.rows_SB], plan.speed_SB)
    tokens_SB = corpus.token_length[plan.rows_SB]
    batch_size = plan.rows_SB.shape[1]
    return tuple(
        float(1 - used_SB.sum() / (width[plan.bucket_S].sum() * batch_size))
        for used_SB, width in ((frames_SB, frames), (tokens_SB, tokens))
    )


def describe_buckets(corpus: Corpus, buckets, plan: Plan) -> list[str]:
    """A line for each bucket: its shape, its share of an epoch's steps, and how full it is."""
    rows, lines = plan.rows_SB.shape[1], []
    for b, (frames, tokens) in enumerate(buckets):
        mine = plan.bucket_S == b
        part = Plan(plan.rows_SB[mine], plan.speed_SB[mine], None, plan.bucket_S[mine])
        empty = padding(corpus, buckets, part)[0] if mine.any() else 1.0
        lines.append(
            f"bucket of {frames} frames x {tokens} tokens: {mine.sum()} of {len(mine)} steps, "
            f"{rows} rows each, {1 - empty:.0%} of frames filled"
        )
    return lines
