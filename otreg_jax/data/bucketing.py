"""Few shapes for utterances of every length, and the batches that fill them."""

import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from otreg_jax.data import features, index, prompts
from otreg_jax.data.utterances import Utterance

FRAMES_MULTIPLE = 8  # bucket widths, so that convolution strides and frame stacking divide them
# What a padded token costs: it is a position of the LLM, as some 8 frames are, which the encoder
# reads too. By FLOPs 3 frames (Whisper-large-v3 and an LLM of 1.5B) to 5 (base and one of 135M).
TOKEN_FRAMES = 3
ROUNDS = 6  # of choosing shapes; real lengths need two or three


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
    """The batches of an epoch: draws, one batch after another."""

    rows: np.ndarray  # int [draws], rows of the corpus
    speed: np.ndarray  # float, how many times as fast each is played
    repeated: np.ndarray  # bool, whether the draw is one too many
    bucket_S: np.ndarray  # int [steps], the shape of each batch
    start_S: np.ndarray  # int [steps], where each batch begins among the draws
    size_S: np.ndarray  # int [steps], its draws
    slots_SK: np.ndarray | None = None  # int [steps, K], slots of packed rows, see `packing`

    def batch(self, step: int, part: slice = slice(None)) -> "Plan":
        """The plan of one batch, or of a part of it."""
        start, size = self.start_S[step], self.size_S[step]
        mine = slice(*part.indices(size))
        draws = slice(start + mine.start, start + mine.stop)
        bucket_S, size_S = self.bucket_S[[step]], np.array([mine.stop - mine.start])
        of_draws = self.rows[draws], self.speed[draws], self.repeated[draws]
        slots_1K = None if self.slots_SK is None else self.slots_SK[[step]]
        return Plan(*of_draws, bucket_S, np.zeros(1, int), size_S, slots_1K)

    def in_order(self, order_S: np.ndarray) -> "Plan":
        """The same batches in another order; the draws stay where they are."""
        of_steps = (self.bucket_S, self.start_S, self.size_S, self.slots_SK)
        of_steps = (None if x is None else x[order_S] for x in of_steps)
        return Plan(self.rows, self.speed, self.repeated, *of_steps)


def make_corpus(
    utterances: Sequence[Utterance], tokenizer, prompter=None, window: float = 0
) -> Corpus:
    """Tokenizes answers and transcripts, and measures prompts; of indexed utterances once for all.

    prompter: of `prompts`; None: the answers are the transcripts, and all prompts are one.
    window: in seconds, as `data.window`.

    Raises ValueError if there is no utterance.
    """
    if not utterances:
        raise ValueError("there are no utterances to batch")
    tokenized = lambda: _tokenize(utterances, tokenizer, prompter)
    return Corpus(
        utterances,
        np.round(index.durations(utterances) * features.SAMPLE_RATE).astype(np.int64),
        **index.remember(utterances, "tokens", _made_of(tokenizer, prompter), tokenized),
        window=round(window * features.FRAME_RATE),
    )


def _made_of(tokenizer, prompter) -> list:
    """What tokens depend on beside the utterances."""
    return [
        getattr(tokenizer, "fingerprint", ""),
        prompter and [prompter.tasks, prompter.distractors],
    ]


def _tokenize(utterances: Sequence[Utterance], tokenizer, prompter) -> dict:
    """What a Corpus holds of texts and prompts."""
    tokens, span_of, spans, longest = array.array("i"), {}, array.array("q"), array.array("q")
    is_own = prompter is not None and not prompts.is_fixed(prompter.tasks)
    for utterance in tqdm.tqdm(utterances, desc="tokenizing", unit="utt", delay=2):
        for text in (prompts.answer(prompter, utterance), utterance.text):
            if text not in span_of:
                start = len(tokens)
                tokens.extend(tokenizer.encode(text))
                span_of[text] = start, len(tokens)
            spans.extend(span_of[text])
        if is_own:
            longest.extend(prompts.longest(prompter, utterance))
    answer_N2, heard_N2 = np.array(spans).reshape(-1, 2, 2).swapaxes(0, 1)
    return {
        "tokens": np.array(tokens),
        "answer_N2": answer_N2.copy(),
        "heard_N2": None if np.array_equal(answer_N2, heard_N2) else heard_N2.copy(),
        "prompt_N2": np.array(longest).reshape(-1, 2) if is_own else None,
    }


def used_tokens(corpus: Corpus, tokenizer, prompter) -> list[int]:
    """The ids of the tokens that the transcripts are made of, rising, each once; the corpus is of
    this tokenizer and prompter."""

    def look():
        is_heard = np.ones(len(corpus.tokens), bool)
        if corpus.heard_N2 is not None:
            edges = np.zeros(len(corpus.tokens) + 1, np.int8)
            start, end = np.unique(corpus.heard_N2[np.diff(corpus.heard_N2)[:, 0] > 0], axis=0).T
            edges[start] += 1
            edges[end] -= 1
            is_heard = np.cumsum(edges[:-1], dtype=np.int8) > 0
        blocks = (slice(i, i + 2**24) for i in range(0, len(corpus.tokens), 2**24))
        found = (np.unique(corpus.tokens[block][is_heard[block]]).tolist() for block in blocks)
        return {"ids": sorted(set().union(*found))}

    return index.remember(corpus.utterances, "used", _made_of(tokenizer, prompter), look)["ids"]


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
    """The (frames, tokens) shapes that pad the least when every utterance goes to the first one
    that holds it, a token as dear as TOKEN_FRAMES frames.

    Frames and tokens of the shapes are chosen in turn, each time exactly for what the other is
    (dynamic programming over the distinct lengths), until neither gets better. An utterance that
    says much for its length goes to a longer shape, and does not widen that of all others.

    Args:
      frames_N: int [N], mel frames of each utterance.
      tokens_N: int [N], transcript tokens of each utterance.
      num_buckets: how many shapes there may be; fewer come back if the lengths do not differ.

    Returns:
      ((frames, tokens), ...), both rising; frames are multiples of FRAMES_MULTIPLE.
    """
    frames, f_N = _distinct(-(-frames_N // FRAMES_MULTIPLE) * FRAMES_MULTIPLE)
    tokens, t_N = _distinct(np.maximum(tokens_N, 1))
    size = len(frames), len(tokens)
    counts = np.bincount(f_N * size[1] + t_N, minlength=size[0] * size[1])
    # held[i, j]: utterances of at most frames[i] and tokens[j]
    held = counts.reshape(size).cumsum(axis=0).cumsum(axis=1)
    cost = frames[:, None] + TOKEN_FRAMES * tokens.astype(float)
    shapes_t = np.full(min(num_buckets, len(frames)), len(tokens) - 1)
    for _ in range(ROUNDS):
        shapes_f = _cheapest(held[:, shapes_t], cost[:, shapes_t])
        shapes_t = _cheapest(held[shapes_f].T, cost[shapes_f].T)
    chosen = zip(frames[shapes_f].tolist(), tokens[shapes_t].tolist(), strict=True)
    return tuple(dict.fromkeys(chosen))


def _distinct(lengths_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct lengths, rising, and the place of each among them [N]; without sorting all."""
    distinct = np.flatnonzero(np.bincount(lengths_N))
    place = np.zeros(distinct[-1] + 1, np.int32)
    place[distinct] = np.arange(len(distinct))
    return distinct, place[lengths_N]


def _cheapest(held_LK: np.ndarray, cost_LK: np.ndarray) -> np.ndarray:
    """The rising lengths [K] of K shapes, the last one the longest, that cost the least.

    held: utterances that shape k holds if its length is the l-th. cost: of each of them there.
    """
    is_longer = np.tri(len(held_LK), k=-1, dtype=bool)  # [l of the shape before, l]
    total_L, before = cost_LK[:, 0] * held_LK[:, 0], []
    for k in range(1, held_LK.shape[1]):
        new_LL = held_LK[:, k] - held_LK[:, k - 1, None]
        total_LL = np.where(is_longer, np.inf, total_L[:, None] + cost_LK[:, k] * new_LL)
        before.append(total_LL.argmin(axis=0))
        total_L = total_LL.min(axis=0)
    chosen = [len(held_LK) - 1]
    for previous_L in reversed(before):
        chosen.append(int(previous_L[chosen[-1]]))
    return np.array(chosen[::-1])


def own_parts(
    corpus: Corpus, rows_B, widths_3, prompter, rngs, is_packed: bool = False
) -> dict[str, np.ndarray]:
    """What the rows of a batch have of their own: prompts, drawn by `rngs`, and transcripts that
    are not the answers; int32 [B, width] of each, and its "..._length" [B]. is_packed: prompts are
    no longer than the corpus says, where there is room for them."""
    ids = {}
    if corpus.prompt_N2 is not None:
        rows = zip(rows_B, rngs, strict=True)
        sizes = lambda row: tuple(corpus.prompt_N2[row] if is_packed else widths_3[:2])
        made = [prompts.prompt(prompter, corpus.utterances[r], rng, sizes(r)) for r, rng in rows]
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


def rows_by_seconds(buckets, seconds: float, unit: int) -> tuple[int, ...]:
    """The rows of each bucket's batches that hold at most so many seconds, padding included: a
    multiple of `unit`.

    Raises:
      ValueError: not even `unit` rows of the widest bucket are so short.
    """
    seconds_of = [frames / features.FRAME_RATE for frames, _ in buckets]
    rows = tuple(int(seconds / each / unit) * unit for each in seconds_of)
    if not rows[-1]:
        raise ValueError(
            f"batch_seconds={seconds:g}: the longest utterances take {seconds_of[-1]:g} s, and a "
            f"step {unit} of them or a multiple (devices times micro-batches): "
            f"{unit * seconds_of[-1]:g} s at least"
        )
    return rows


def deal(corpus: Corpus, draws_N, speed_N, buckets, rows) -> Plan:
    """Deals draws, in order, into batches of one bucket each, narrow buckets first.

    What does not fill a batch of its bucket moves up to the next. The first draws are repeated as
    often as it takes to fill every batch: where all buckets have as many rows each in its own
    bucket, else in the widest.

    Args:
      rows: of every batch, one number or one for each bucket.
    """
    count, last = len(draws_N), len(buckets) - 1
    rows = np.broadcast_to(rows, len(buckets))
    dealt = np.arange(count if np.ptp(rows) else -(-count // rows[0]) * rows[0])
    frames, tokens = np.array(buckets).T
    bucket_N = np.maximum(
        np.searchsorted(frames, frames_of(corpus, draws_N, speed_N)),
        np.searchsorted(tokens, corpus.token_length[draws_N]),
    )
    bucket = bucket_N[dealt % count]
    batches, batches_of, left = [], [], dealt[:0]
    for b in range(len(buckets)):
        waiting = np.concatenate([left, dealt[bucket == b]])
        if b == last:
            waiting = np.concatenate([waiting, count + np.arange(-len(waiting) % rows[b])])
        full = len(waiting) // rows[b] * rows[b]
        batches.append(waiting[:full])
        batches_of.append(full // rows[b])
        left = waiting[full:]
    dealt = np.concatenate(batches)
    bucket_S = np.repeat(np.arange(len(buckets)), batches_of)
    size_S = rows[bucket_S]
    draw = dealt % count
    return Plan(
        draws_N[draw], speed_N[draw], dealt >= count, bucket_S, np.cumsum(size_S) - size_S, size_S
    )


def padding(corpus: Corpus, buckets, plan: Plan) -> tuple[float, float]:
    """The fractions of frames and of tokens in an epoch's batches that are padding."""
    frames, tokens = np.array(buckets).T
    used = frames_of(corpus, plan.rows, plan.speed), corpus.token_length[plan.rows]
    return tuple(
        float(1 - filled.sum() / (width[plan.bucket_S] * plan.size_S).sum())
        for filled, width in zip(used, (frames, tokens), strict=True)
    )


def describe_buckets(corpus: Corpus, buckets, plan: Plan) -> list[str]:
    """A line for each bucket: its shape, its share of an epoch's steps, and how full it is."""
    lines = []
    for b, (frames, tokens) in enumerate(buckets):
        mine = np.flatnonzero(plan.bucket_S == b)
        line = f"bucket of {frames} frames x {tokens} tokens: {len(mine)} of {len(plan.bucket_S)} "
        if not len(mine):
            lines.append(line + "steps")
            continue
        rows, steps = plan.size_S[mine[0]], plan.start_S[mine]
        draws = (steps[:, None] + np.arange(rows)).ravel()
        filled = frames_of(corpus, plan.rows[draws], plan.speed[draws]).sum()
        lines.append(
            f"{line}steps, {rows} rows each ({rows * frames / features.FRAME_RATE:.0f} s), "
            f"{filled / (len(draws) * frames):.0%} of frames filled"
        )
    return lines


def print_plan(corpus: Corpus, buckets, plan: Plan, groups) -> None:
    """Prints an epoch's size, its padding, its shapes, and the shares of several `groups`, pairs of
    a name and its rows."""
    frames, tokens = padding(corpus, buckets, plan)
    hours = corpus.samples.sum() / features.SAMPLE_RATE / 3600
    print(
        f"data: {len(corpus.utterances)} utterances, {hours:.2f} h, {len(plan.bucket_S)} steps an "
        f"epoch; padding {frames:.1%} of frames, {tokens:.1%} of tokens"
    )
    for line in describe_buckets(corpus, buckets, plan):
        print(f"data: {line}")
    for name, rows in groups if len(groups) > 1 else ():
        share = np.isin(plan.rows, rows).mean()
        print(f"data: {share:6.1%} of an epoch from {name} ({len(rows)} utterances)")
