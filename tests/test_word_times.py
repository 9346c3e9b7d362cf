"""Word times from cross-attention: the path through it, and what its rows are words of."""

import itertools

import numpy as np
from scipy.spatial.distance import cdist

from benchmarks import word_times


def test_the_path_is_the_cheapest_monotone_one():
    cost_TF = np.random.default_rng(0).normal(size=(3, 5))

    def paths(t, f):
        if (t, f) == (0, 0):
            yield [(0, 0)]
        for a, b in ((t - 1, f - 1), (t - 1, f), (t, f - 1)):
            if a >= 0 and b >= 0:
                yield from (path + [(t, f)] for path in paths(a, b))

    cheapest = min(paths(2, 4), key=lambda path: sum(cost_TF[at] for at in path))
    first = [min(f for t, f in cheapest if t == row) for row in range(3)]
    np.testing.assert_array_equal(word_times.monotone_path(cost_TF), first)


def test_a_path_finds_where_each_row_begins():
    starts = [0, 3, 4, 11]
    row_F = np.repeat(range(4), np.diff([*starts, 15]))
    cost_TF = cdist(np.arange(4)[:, None], row_F[:, None])
    np.testing.assert_array_equal(word_times.monotone_path(cost_TF), starts)


def test_words_are_tokens_from_one_space_to_the_next():
    pieces = [" He", " saw", " Je", "anne", ".", " No", "!"]
    found = word_times.spans(pieces)
    assert [word for word, _, _ in found] == ["He", "saw", "Jeanne.", "No!"]
    assert [(a, b) for _, a, b in found] == [(0, 1), (1, 2), (2, 5), (5, 7)]
    assert all(b == a for (_, _, b), (_, a, _) in itertools.pairwise(found))
