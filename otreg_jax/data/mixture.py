"""Who is drawn how often: groups of utterances and their shares of an epoch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from otreg_jax.data import index, sources
from otreg_jax.data.utterances import Utterance

# What a random generator is for: no two share a stream.
ORDER, GROUP, AUGMENT, PROMPT = range(4)


def rng_of(purpose: int, *seeds: int) -> np.random.Generator:
    """The generator for a purpose: of the seed, and of an epoch or of a step and a row."""
    return np.random.default_rng([purpose, *seeds])


class Group(NamedTuple):
    """Utterances that are drawn alike; `share` of the draws, but for a factor."""

    name: str
    rows: np.ndarray
    share: float


def groups_of(
    utterances: Sequence[Utterance], rows_N, data_config, weights: Mapping[str, float] = {}
) -> list[Group]:
    """The utterances in `rows_N` by language or manifest, or all of them: `data.mixture`, in
    proportion to size^(1 / data.temperature); or, with `data.weights`, by manifest in the order
    they come. With the `weights` of several tasks, those of each task, whose share of the draws
    that is.

    (Conneau et al. 2020, XLM-R, section 3, sample languages by temperature.)

    Returns:
      Groups, whose rows are places in `rows_N`.
    """
    given = tuple(data_config.weights)
    mixture = "corpus" if given else data_config.mixture
    if mixture not in sources.MIXTURES:
        known = ", ".join(map(repr, sources.MIXTURES))
        raise ValueError(f"data.mixture={mixture!r} is not one of {known}")

    def column(name: str, of):
        number_N, said = index.column(utterances, name, of)
        return number_N[rows_N], said

    constant = lambda: (np.zeros(len(rows_N), np.int32), [""])
    of_N, names = column(mixture, sources.MIXTURES[mixture]) if mixture else constant()
    task_N, tasks = column("task", lambda u: u.task) if len(weights) > 1 else constant()
    names = names if mixture else ["all"]
    numbers, first = np.unique(of_N, return_index=True)
    came = numbers[np.argsort(first)]
    if given and (len(given) != len(came) or min(given) <= 0):
        raise ValueError(
            f"data.weights={given}: give one number above 0 for each of, in this order, "
            + ", ".join(names[i] for i in came)
        )
    share_of = dict(zip(came, given, strict=False))
    groups = []
    for task in np.unique(task_N):
        mine = {i: np.flatnonzero((of_N == i) & (task_N == task)) for i in numbers}
        mine = {i: rows for i, rows in mine.items() if len(rows)}
        share = {
            i: share_of.get(i, len(r) ** (1 / data_config.temperature)) for i, r in mine.items()
        }
        scale = weights[tasks[task]] / sum(share.values()) if tasks[task] else 1.0
        for i, rows in mine.items():
            words = [names[i]] if not tasks[task] else [tasks[task], names[i]][: len(mine)]
            groups.append(Group(", ".join(words), rows, scale * float(share[i])))
    return groups


def draw(groups: Sequence[Group], seed: int, epoch: int) -> np.ndarray:
    """As many rows as there are utterances, from each group its share.

    Each group is gone through in a fresh order each time, and goes on in the next epoch where it
    stopped in this one.
    """
    size_G = np.array([len(g.rows) for g in groups])
    share_G = np.array([g.share for g in groups])
    share_G = share_G / share_G.sum() * size_G.sum()
    count_G = np.floor(share_G).astype(int)
    count_G[np.argsort(count_G - share_G, kind="stable")[: size_G.sum() - count_G.sum()]] += 1
    drawn = []
    for g, ((_, rows, _), size, count) in enumerate(zip(groups, size_G, count_G, strict=True)):
        start = epoch * count
        rounds = range(start // size, -(-(start + count) // size))
        stream = [rows[rng_of(GROUP, seed, g, r).permutation(size)] for r in rounds]
        drawn += [np.concatenate([rows[:0], *stream])[start % size :][:count]]
    return np.concatenate(drawn)
