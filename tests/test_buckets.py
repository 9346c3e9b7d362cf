"""Batch shapes: those that pad the least."""

import itertools

import numpy as np
import pytest

from otreg_jax.data import bucketing


def padded(frames, tokens, buckets):
    """What utterances take in the first bucket that holds them."""
    cost = lambda bucket: bucket[0] + bucketing.TOKEN_FRAMES * bucket[1]
    holds = lambda bucket, f, t: bucket[0] >= f and bucket[1] >= t
    return sum(
        cost(next(b for b in buckets if holds(b, f, t)))
        for f, t in zip(frames, tokens, strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_other_width_or_token_length_of_a_bucket_pads_less(seed):
    rng = np.random.default_rng(seed)
    frames = rng.integers(1, 120, size=60)
    tokens = 1 + frames // 20 + rng.integers(0, 6, size=60)
    buckets = bucketing.choose_buckets(frames, tokens, 3)
    found, (last, most) = padded(frames, tokens, buckets), buckets[-1]
    assert len(buckets) == 3 and all(list(x) == sorted(x) for x in zip(*buckets, strict=True))
    widths, lengths = (sorted({*map(int, x)}) for x in (-(-frames // 8) * 8, tokens))
    assert (last, most) == (widths[-1], lengths[-1])
    (a, s), (b, t) = buckets[:2]
    pairs = lambda values: itertools.combinations_with_replacement(values, 2)
    for c, d in pairs(widths):
        assert found <= padded(frames, tokens, ((c, s), (d, t), buckets[-1]))
    for c, d in pairs(lengths):
        assert found <= padded(frames, tokens, ((a, c), (b, d), buckets[-1]))


def test_buckets_of_few_lengths():
    assert bucketing.choose_buckets(np.array([5, 7]), np.array([0, 0]), 4) == ((8, 1),)
    buckets = bucketing.choose_buckets(np.array([8, 16, 8]), np.array([3, 2, 1]), 4)
    assert buckets == ((8, 3), (16, 3))
    # One that says much for its length goes to a longer shape, and does not widen all others'.
    frames, tokens = np.array([8] * 50 + [160] * 10), np.array([2] * 49 + [30] * 11)
    assert bucketing.choose_buckets(frames, tokens, 2) == ((8, 2), (160, 30))
