"""Few shapes for utterances of every length, and the batches that fill them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from otreg_jax.data import features, prompts
from otreg_jax.data.utterances import Utterance

FRAMES_MULTIPLE = 8  # bucket widths, so that convolution strides and frame stacking divide them


class Corpus(NamedTuple):
    """Utterances with what batching needs to know about them, in the same order.

    What a model says, or hears, of an utterance is a span of `tokens`; texts that are equal share
    it. `heard_N2` is None where all answers are transcripts, `prompt_N2` where all prompts are one.
    """

    utterances: Sequence[Utterance]
    samples: np.ndarray  # int64 [N] at 16 kHz, before silence fills them up
    tokens: np.ndarray  # int32, all texts one after another
    answer_N2: np.ndarray  # int64, where each answer begins and ends in `tokens`
    heard_N2: np.ndarray | None = None  # the transcripts, likewise
    prompt_N2: np.ndarray | None = None  # int64, the most tokens of a prefix and of a suffix
    window: int = 0  # mel frames that silence fills up shorter audio to

    @property
    def token_length(self) -> np.ndarray:
        return self.answer_N2[:, 1] - self.answer_N2[:, 0]

    def answer(self, row: int) -> np.ndarray:
        return self.tokens[slice(*self.answer_N2[row])]

    def transcript(self, row: int) -> np.ndarray:
        return self.tokens[
            slice(*(self.answer_N2 if self.heard_N2 is None else self.heard_N2)[row])
        ]


class Plan(NamedTuple):
    """The batches of an epoch."""

    rows_SB: np.ndarray  # int [steps, batch_size], rows of the corpus
    speed_SB: np.ndarray  # float, how many times as fast each is played
    repeated_SB: np.ndarray  # bool, whether the draw is one too many
    bucket_S: np.ndarray  # int, the shape of each batch


def make_corpus(
    utterances: Sequence[Utterance], tokenizer, prompter=None, window: float = 0
) -> Corpus:
    """Tokenizes answers and transcripts, and measures prompts.

    prompter: of `prompts`; None: the answers are the transcripts, and all prompts are one.
    window: in seconds, as `data.window`.

    Raises ValueError if there is no utterance.
    """
    if not utterances:
        raise ValueError("there are no utterances to batch")
    answers = [prompts.answer(prompter, u) for u in utterances]
    texts = [answers]
    if any(u.text != answer for u, answer in zip(utterances, answers, strict=True)):
        texts.append([u.text for u in utterances])
    tokens, spans = _tokenize(texts, tokenizer)
    is_own = prompter is not None and not prompts.is_fixed(prompter.tasks)
    return Corpus(
        utterances,
        np.array([round(u.duration * features.SAMPLE_RATE) for u in utterances]),
        tokens,
        *(spans if len(spans) == 2 else (*spans, None)),
        np.array([prompts.longest(prompter, u) for u in utterances]) if is_own else None,
        round(window * features.FRAME_RATE),
    )


def _tokenize(lists: list[list[str]], tokenizer) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tokens of all texts, equal ones once, and for each list of N texts their spans [N, 2]."""
    ids, spans, end = [], {}, 0
    for text in itertools.chain(*lists):
        if text not in spans:
            ids.append(np.asarray(tokenizer.encode(text), np.int32))
            spans[text] = (end, end + len(ids[-1]))
            end = spans[text][1]
    return np.concatenate(ids), [np.array([spans[text] for text in texts]) for texts in lists]


def own_widths(corpus: Corpus, rows_N, speeds, buckets) -> np.ndarray:
    """[buckets, 3], int: the most tokens of a prefix, a suffix and a transcript among the
    utterances that may get into each bucket; 0 where the corpus has none of its own."""
    frames, tokens = np.array(buckets).T
    fastest_N = frames_of(corpus, rows_N, max(speeds))
    first_N = np.maximum(
        np.searchsorted(frames, fastest_N), np.searchsorted(tokens, corpus.token_length[rows_N])
    )
    lengths_N3 = np.zeros((len(rows_N), 3), int)
    if corpus.prompt_N2 is not None:
        lengths_N3[:, :2] = corpus.prompt_N2[rows_N]
    if corpus.heard_N2 is not None:
        lengths_N3[:, 2] = np.diff(corpus.heard_N2[rows_N])[:, 0]
    widths = np.zeros((len(buckets), 3), int)
    np.maximum.at(widths, first_N, lengths_N3)
    return np.maximum.accumulate(widths)  # what does not fill a batch moves up


def frames_of(corpus: Corpus, rows_N: np.ndarray, speed=1.0) -> np.ndarray:
    """Mel frames of these utterances played `speed` times as fast, silence included."""
    frames_N = features.num_frames(np.ceil(corpus.samples[rows_N] / speed).astype(np.int64))
    return np.maximum(frames_N, corpus.window)


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


def own_parts(corpus: Corpus, rows_B, widths_3, prompter, rngs) -> dict[str, np.ndarray]:
    """What the rows of a batch have of their own: prompts, drawn by `rngs`, and transcripts that
    are not the answers; int32 [B, width] of each, and its "..._length" [B]."""
    ids = {}
    if corpus.prompt_N2 is not None:
        rows = zip(rows_B, rngs, strict=True)
        sizes = tuple(widths_3[:2])
        made = [prompts.prompt(prompter, corpus.utterances[r], rng, sizes) for r, rng in rows]
        ids |= {"prefix": [p.prefix for p in made], "suffix": [p.suffix for p in made]}
    if corpus.heard_N2 is not None:
        ids["transcript"] = [corpus.transcript(row) for row in rows_B]
    batch = {}
    for name, width in zip(("prefix", "suffix", "transcript"), widths_3, strict=True):
        if name in ids:
            padded = np.zeros((len(rows_B), max(width, 1)), np.int32)
            for row, found in zip(padded, ids[name], strict=True):
                row[: len(found)] = found
            batch[name] = padded
            batch[f"{name}_length"] = np.array([len(found) for found in ids[name]], np.int32)
    return batch


def deal(corpus: Corpus, draws_N, speed_N, buckets, batch_size: int) -> Plan:
    """Deals draws, in order, into batches of one bucket each, narrow buckets first.

    The first draws are repeated as often as it takes to fill every batch.
    """
    dealt = np.arange(-(-len(draws_N) // batch_size) * batch_size)
    rows, speed = np.resize(draws_N, len(dealt)), np.resize(speed_N, len(dealt))
    frames, tokens = np.array(buckets).T
    bucket = np.maximum(
        np.searchsorted(frames, frames_of(corpus, rows, speed)),
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
    frames_SB = frames_of(corpus, plan.rows_SB, plan.speed_SB)
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
