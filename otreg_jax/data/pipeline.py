"""Batches as a pure function of (seed, step).

An epoch is a seeded permutation of the utterances, dealt into buckets: a few shapes (mel frames,
transcript tokens), each compiled once. What does not fill a batch of its bucket moves up to the
next one, and the last batch of the epoch is completed by repeating utterances: nothing is dropped,
and an epoch is always ceil(utterances / batch_size) steps. The rows of every global batch are fixed
before each host takes its own: any number of hosts and workers, and a restart at any step, see the
same.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from otreg_jax.data import features, sources
from otreg_jax.data.sources import BadAudio, Problem, Utterance

FRAMES_MULTIPLE = 8  # bucket widths, so that convolution strides and frame stacking divide them
CACHE_BYTES = 2**30  # of features kept in memory between epochs

Batch = dict[str, np.ndarray]


class Corpus(NamedTuple):
    """Utterances with what batching needs to know about them, in the same order."""

    utterances: Sequence[Utterance]
    frames: np.ndarray  # int32 [N]
    tokens: np.ndarray  # int32, all transcripts one after another
    ends: np.ndarray  # int64 [N], where each transcript ends in `tokens`

    @property
    def token_lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0).astype(np.int32)

    def transcript(self, row: int) -> np.ndarray:
        return self.tokens[self.ends[row - 1] if row else 0 : self.ends[row]]


def train_batches(
    utterances: Sequence[Utterance],
    tokenizer,
    data_config: ConfigDict,
    *,
    batch_size: int,
    seed: int,
    num_steps: int,
    start_step: int = 0,
    host_index: int = 0,
    host_count: int = 1,
    skipped_path: str | None = None,
) -> Iterator[Batch]:
    """Yields this host's rows of the batches of steps start_step … num_steps - 1.

    Args:
      utterances: the training data, in the same order on every host.
      tokenizer: has `encode(text) -> list[int]`.
      data_config: num_buckets, num_mels, num_workers, on_bad_audio.
      batch_size: utterances a step over all hosts.
      seed: decides, with the step, what a batch holds.
      num_steps: the step before which the iterator ends, on every host alike.
      start_step: first step, when training resumes.
      host_index, host_count: which rows of the global batch: an equal share, in order.
      skipped_path: JSON-lines file that lists audio found unusable (on_bad_audio="skip").

    Yields:
      {"mel": float32 [B, F, M], "mel_length": int32 [B], "tokens": int32 [B, T] (transcripts only),
      "token_length": int32 [B], "index": int32 [B], row in `utterances`}. A row whose audio turned
      out unusable is a filler: index -1, token_length 0, silence.

    Raises:
      ValueError: no utterances, or a batch size that the hosts cannot share.
      BadAudio (a ValueError): an audio file is unusable (on_bad_audio="raise").
    """
    if batch_size % host_count:
        raise ValueError(f"batch_size={batch_size} does not divide among {host_count} hosts")
    corpus = _tokenize(utterances, tokenizer)
    buckets = choose_buckets(corpus.frames, corpus.token_lengths, data_config.num_buckets)
    bucket_N = _smallest_bucket(corpus, buckets)
    share = batch_size // host_count
    mine = slice(host_index * share, (host_index + 1) * share)
    load = _loader(corpus, data_config, skipped_path)
    if host_index == 0:
        _print_buckets(corpus, buckets, _epoch(bucket_N, batch_size, seed, 0))

    steps_per_epoch = -(-len(utterances) // batch_size)
    plans = {}  # of the epoch in use and of the next, which workers read ahead

    def batch(step: int) -> Batch:
        epoch = step // steps_per_epoch
        if epoch not in plans:
            plans.pop(epoch - 2, None)
            plans[epoch] = _epoch(bucket_N, batch_size, seed, epoch)
        rows_SB, bucket_S = plans[epoch]
        within = step % steps_per_epoch
        shape = buckets[bucket_S[within]]
        return _assemble(rows_SB[within, mine], shape, corpus, load, data_config.num_mels)

    return _iterate(batch, start_step, num_steps, data_config.num_workers)


def eval_batches(
    utterances: Sequence[Utterance],
    tokenizer,
    data_config: ConfigDict,
    *,
    batch_size: int,
    host_index: int = 0,
    host_count: int = 1,
    skipped_path: str | None = None,
) -> Iterator[Batch]:
    """Yields every utterance once, short ones first, in batches as `train_batches` makes them.

    The last batch is completed with fillers: a repeated utterance with index -1 and token_length 0.
    Every host yields the same number of batches.
    """
    if batch_size % host_count:
        raise ValueError(f"batch_size={batch_size} does not divide among {host_count} hosts")
    corpus = _tokenize(utterances, tokenizer)
    buckets = choose_buckets(corpus.frames, corpus.token_lengths, data_config.num_buckets)
    rows_SB, bucket_S = _deal(
        np.argsort(corpus.frames, kind="stable"), _smallest_bucket(corpus, buckets), batch_size
    )
    share = batch_size // host_count
    mine = slice(host_index * share, (host_index + 1) * share)
    load = _loader(corpus, data_config, skipped_path)
    repeated_SB = np.zeros(rows_SB.size, bool)
    repeated_SB[len(utterances) :] = True
    repeated_SB = repeated_SB.reshape(rows_SB.shape)

    def batch(step: int) -> Batch:
        shape = buckets[bucket_S[step]]
        made = _assemble(rows_SB[step, mine], shape, corpus, load, data_config.num_mels)
        filler = repeated_SB[step, mine]
        made["index"] = np.where(filler, -1, made["index"])
        made["token_length"] = np.where(filler, 0, made["token_length"])
        return made

    return _iterate(batch, 0, len(rows_SB), data_config.num_workers)


# ------------------------------------------------------------------------------------------------
# Which utterances, in which shape, at which step
# ------------------------------------------------------------------------------------------------


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
    if not len(frames_N):
        raise ValueError("there are no utterances to batch")
    rounded_N = -(-frames_N // FRAMES_MULTIPLE) * FRAMES_MULTIPLE
    widths, counts = np.unique(rounded_N, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # utterances narrower than width i
    # cost[j]: frames computed for the widths[:j], in the number of buckets reached so far
    cost = np.concatenate([[0.0], np.full(len(widths), np.inf)])
    chosen = []
    for _ in range(min(num_buckets, len(widths))):
        # One more bucket, of width j - 1, that takes everything from width i on.
        total = cost[:-1, None] + (below[None, 1:] - below[:-1, None]) * widths
        total[np.tril_indices(len(widths), -1)] = np.inf
        chosen.append(total.argmin(axis=0))
        cost = np.concatenate([[0.0], total.min(axis=0)])
    edges, j = [], len(widths)
    for start in reversed(chosen):
        if j == 0:
            break
        edges.append(int(widths[j - 1]))
        j = int(start[j - 1])
    edges.reverse()
    return tuple((edge, max(1, int(tokens_N[frames_N <= edge].max()))) for edge in edges)


def _smallest_bucket(corpus: Corpus, buckets) -> np.ndarray:
    """int [N]: the first bucket that each utterance fits."""
    frames, tokens = np.array(buckets).T
    return np.maximum(
        np.searchsorted(frames, corpus.frames), np.searchsorted(tokens, corpus.token_lengths)
    )


def _deal(order_N, bucket_N, batch_size):
    """Deals utterances, in order, into batches of one bucket each.

    Returns rows [steps, batch_size] and the bucket of each step [steps]. Flattened, the rows are
    all utterances once, then those that complete the last batch.
    """
    batches, steps, left = [], [], order_N[:0]
    for bucket in range(bucket_N.max() + 1):
        waiting = np.concatenate([left, order_N[bucket_N[order_N] == bucket]])
        full = len(waiting) // batch_size * batch_size
        batches.append(waiting[:full])
        steps += [bucket] * (full // batch_size)
        left = waiting[full:]
    if len(left):
        batches += [left, np.resize(order_N, batch_size - len(left))]
        steps.append(bucket_N.max())
    return np.concatenate(batches).reshape(-1, batch_size), np.array(steps)


def _epoch(bucket_N, batch_size, seed, epoch):
    """The batches of an epoch, shuffled: as `_deal` returns them."""
    rng = np.random.default_rng([seed, epoch])
    rows_SB, bucket_S = _deal(rng.permutation(len(bucket_N)), bucket_N, batch_size)
    shuffled_S = rng.permutation(len(bucket_S))
    return rows_SB[shuffled_S], bucket_S[shuffled_S]


def _print_buckets(corpus: Corpus, buckets, plan) -> None:
    rows_SB, bucket_S = plan
    frames, tokens = np.array(buckets).T
    padding = [
        1 - lengths[rows_SB].sum() / (widths[bucket_S].sum() * rows_SB.shape[1])
        for lengths, widths in ((corpus.frames, frames), (corpus.token_lengths, tokens))
    ]
    shapes = " ".join(f"{f}x{t}" for f, t in buckets)
    print(
        f"data: {len(corpus.utterances)} utterances, {corpus.frames.sum() / 360000:.2f} h, "
        f"{len(rows_SB)} steps an epoch; buckets (frames x tokens) {shapes}; "
        f"padding {padding[0]:.1%} of frames, {padding[1]:.1%} of tokens"
    )


# ------------------------------------------------------------------------------------------------
# What a batch holds
# ------------------------------------------------------------------------------------------------


def _tokenize(utterances: Sequence[Utterance], tokenizer) -> Corpus:
    ids = [np.asarray(tokenizer.encode(u.text), np.int32) for u in utterances]
    samples = [round(u.duration * features.SAMPLE_RATE) for u in utterances]
    return Corpus(
        utterances,
        features.num_frames(np.array(samples, np.int64)).astype(np.int32),
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        np.cumsum([len(i) for i in ids], dtype=np.int64),
    )


def _loader(corpus: Corpus, data_config, skipped_path) -> Callable[[int], np.ndarray | None]:
    """Returns a function from an utterance's row to its mel [F, M], or None for unusable audio."""
    reported = set()

    def load(row: int) -> np.ndarray | None:
        try:
            audio = sources.load_audio(corpus.utterances[row])
        except BadAudio as error:
            if data_config.on_bad_audio != "skip":
                raise
            if row not in reported:
                reported.add(row)
                problem = Problem(error.kind, corpus.utterances[row].where, str(error))
                sources.record_skipped([problem], skipped_path)
            return None
        return features.log_mel(audio, data_config.num_mels)

    # Worker processes would each keep a cache of their own.
    return load if data_config.num_workers else _remembering(load, CACHE_BYTES)


def _remembering(load: Callable[[int], np.ndarray | None], room: int):
    """`load` that keeps its results until they fill `room` bytes."""
    kept, lock = {}, threading.Lock()

    def remembered(row: int) -> np.ndarray | None:
        nonlocal room
        if row not in kept:
            mel = load(row)
            size = 0 if mel is None else mel.nbytes
            with lock:
                if size > room:
                    return mel
                room -= size
                kept[row] = mel
        return kept[row]

    return remembered


def _assemble(rows_B, bucket, corpus: Corpus, load, num_mels: int) -> Batch:
    frames, tokens = bucket
    batch = {
        "mel": np.zeros((len(rows_B), frames, num_mels), np.float32),
        "mel_length": np.full(len(rows_B), frames, np.int32),
        "tokens": np.zeros((len(rows_B), tokens), np.int32),
        "token_length": np.zeros(len(rows_B), np.int32),
        "index": np.full(len(rows_B), -1, np.int32),
    }
    for i, row in enumerate(rows_B.tolist()):
        mel = load(row)
        if mel is not None:
            mel, transcript = mel[:frames], corpus.transcript(row)
            batch["mel"][i, : len(mel)] = mel
            batch["mel_length"][i] = len(mel)
            batch["tokens"][i, : len(transcript)] = transcript
            batch["token_length"][i] = len(transcript)
            batch["index"][i] = row
    return batch


def _iterate(batch: Callable[[int], Batch], start: int, stop: int, num_workers: int):
    """batch(start), …, batch(stop - 1), made ahead of use by threads or by worker processes."""
    dataset = grain.MapDataset.range(start, stop).map(batch)
    threads = grain.ReadOptions(num_threads=1 if num_workers else 2, prefetch_buffer_size=4)
    dataset = dataset.to_iter_dataset(threads)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read its flags
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options)
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()  # or worker processes and their shared memory would outlive it
