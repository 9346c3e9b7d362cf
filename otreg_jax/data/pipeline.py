"""Batches as a pure function of (seed, step).

An epoch is a seeded permutation of the utterances, dealt into buckets: a few shapes (mel frames,
transcript tokens), each compiled once. What does not fill a batch of its bucket moves up to the
next one; a few utterances, drawn twice, fill the last batch. So nothing is dropped. A batch has
`batch_size` rows, and an epoch is always ceil(utterances / batch_size) steps; or each bucket has as
many rows as make `batch_seconds`, so that all steps cost about the same. The rows of every global
batch are fixed before each host takes its own: any number of hosts and workers, and a restart at
any step, see the same.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from otreg_jax import packing
from otreg_jax.data import audio, augment, features, mixture, prompts, sources
from otreg_jax.data.bucketing import (
    Corpus,
    Plan,
    choose_buckets,
    deal,
    frames_of,
    make_corpus,
    own_parts,
    own_widths,
    print_plan,
    rows_by_seconds,
)
from otreg_jax.data.mixture import AUGMENT, ORDER, PROMPT, rng_of
from otreg_jax.data.utterances import BadAudio, Problem, Utterance

MEMORY_BYTES = 2**30  # audio or features up to this size are kept in memory between epochs
NUM_PACKED = 4096  # steps whose padding with packing is computed where it is off
NUM_HEARD = 256  # utterances looked at for the data report where not all are read at the start

Batch = dict[str, np.ndarray]


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
    kept=None,
    prompter: prompts.Prompter | None = None,
    batch_seconds: float = 0.0,
    unit: int = 1,
    corpus: Corpus | None = None,
    frontend: features.Frontend = features.LOG_MEL,
    positions_of: Callable | None = None,
    encoder_positions_of: Callable | None = None,
    packed: bool = False,
    accumulation: int = 1,
) -> Iterator[Batch]:
    """Yields this host's rows of the batches of steps start_step … num_steps - 1.

    Args:
      utterances: the training data, in the same order on every host.
      tokenizer: has `encode(text) -> list[int]`.
      data_config: the `data` part of the configuration.
      batch_size: utterances a step over all hosts.
      seed: decides, with the step, what a batch holds.
      num_steps: the step before which the iterator ends, on every host alike.
      start_step: first step, when training resumes.
      host_index, host_count: which rows of the global batch: an equal share, in order.
      skipped_path: JSON-lines file that lists what was unusable (on_bad_audio="skip").
      kept: the encoder's outputs for these utterances (`encoded.Kept`), if they are to be used.
      prompter: what makes prompts and answers of utterances that have a task; None: the model
        answers with transcripts.
      batch_seconds: audio of a step over all hosts, padding included, in place of `batch_size`; 0:
        not so. unit: rows of a batch are then a multiple of it.
      corpus: what `make_corpus` gives for these utterances, if it was asked before.
      frontend: what the encoder reads.
      positions_of: the LLM's positions, tokens left out, that so many mel frames become, an array
        of them too; with the prompt if all rows have one. None: padding there is not spoken of.
      encoder_positions_of: likewise those of an encoder that can be packed too; None: it cannot.
      packed: deal the rows of a batch to `unit` packed rows, see `packing`. accumulation:
        micro-batches that these are cut into.

    Yields:
      {"mel": float32 [B, F, M], frames of the frontend, "mel_length": int32 [B], "tokens": int32
      [B, T] (answers only), "token_length": int32 [B], "index": int32 [B], row in `utterances`};
      where utterances have prompts of their own, "prefix" and "suffix", and where answers are not
      transcripts, "transcript", int32 [B, widths of the bucket] with their lengths. With
      features="step", "audio": float32 [B, N] and "audio_length": int32 [B] stand in for mel and
      mel_length; with `kept`, "encoded" [B, positions(F), E] in its dtype stands in for mel. With
      `packed` also "segments", int32 [packed rows, slots], see `packing.segments`, and for the
      encoder "encoder_segments". A row whose audio turned out unusable is a filler: index -1,
      token_length 0, silence.

    Raises:
      ValueError: no usable utterance, a batch size that the hosts cannot share, or unusable
        utterances (on_bad_audio="raise"); where all audio fits in memory it is read before the
        first step, and the message lists every unusable file.
    """
    corpus = corpus or make_corpus(utterances, tokenizer, prompter, data_config.window)
    rows_N = _within_token_limit(corpus, data_config, skipped_path if host_index == 0 else None)
    speeds = tuple(data_config.augment.speeds)
    buckets = choose_buckets(
        np.concatenate([frames_of(corpus, rows_N, speed) for speed in speeds]),
        np.tile(corpus.token_length[rows_N], len(speeds)),
        data_config.num_buckets,
    )
    widths = own_widths(corpus, rows_N, speeds, buckets)
    weights = {name: task.weight for name, task in (prompter.tasks if prompter else {}).items()}
    groups = mixture.groups_of(utterances, rows_N, data_config, weights)

    size = rows_by_seconds(buckets, batch_seconds, unit) if batch_seconds else batch_size
    for rows in np.unique(size):
        _share(rows, host_index, host_count)

    def plan_epoch(epoch: int) -> Plan:
        rng = rng_of(ORDER, seed, epoch)
        draws_N = rows_N[mixture.draw(groups, seed, epoch)]
        draws_N = rng.permutation(draws_N)
        speed_N = rng.choice(speeds, size=len(draws_N))
        plan = deal(corpus, draws_N, speed_N, buckets, size)
        if packed:
            plan = packing.pack(plan, positions_in(plan), unit, accumulation, first_slots)
        return plan.in_order(rng.permutation(len(plan.bucket_S)))

    def positions_with(frames_N: np.ndarray, around_N) -> np.ndarray:
        """int [K, N], for `packing`: positions that so many frames take in the LLM, with what is
        around them there, and in the encoder if that can be packed too."""
        further = [encoder_positions_of(frames_N)] if encoder_positions_of else []
        return np.stack([positions_of(frames_N) + around_N, *further])

    def positions_in(plan: Plan) -> np.ndarray:
        heard = corpus._replace(window=0) if data_config.window_masked else corpus
        own = 0 if corpus.prompt_N2 is None else corpus.prompt_N2[plan.rows].sum(axis=1)
        around_N = own + corpus.token_length[plan.rows]
        return positions_with(frames_of(heard, plan.rows, plan.speed), around_N)

    plans, first_steps = {}, {0: 0}  # plans of the epoch in use and of the next, read ahead
    first_slots = {}  # of packed rows [K], by bucket
    # Epochs are as long as one another where nothing that is drawn changes a length.
    is_regular = not batch_seconds or (len(speeds) == 1 and len(groups) == 1)

    def plan_of(epoch: int) -> Plan:
        if (plan := plans.get(epoch)) is None:
            plans.pop(epoch - 2, None)
            plan = plans[epoch] = plan_epoch(epoch)
        return plan  # another thread may have taken it out by now

    def first_step(epoch: int) -> int:
        if epoch not in first_steps:
            first_steps[epoch] = first_step(epoch - 1) + len(plan_of(epoch - 1).bucket_S)
        return first_steps[epoch]

    def plan_step(step: int) -> tuple[Plan, int]:
        if is_regular:
            epoch, s = divmod(step, first_step(1))
            return plan_of(epoch), s
        epoch = 0
        while first_step(epoch + 1) <= step:
            epoch += 1
        return plan_of(epoch), step - first_step(epoch)

    if packed:
        bucket_S, slots_SK = plan_of(0).bucket_S.tolist(), plan_of(0).slots_SK.tolist()
        first_slots = dict(zip(bucket_S, slots_SK, strict=True))
    if host_index == 0:
        print_plan(corpus, buckets, plan_of(0), [(g.name, rows_N[g.rows]) for g in groups])
        if positions_of:
            frames_b, tokens_b = np.array(buckets).T
            full_Kb = positions_with(frames_b, widths[:, :2].sum(axis=1) + tokens_b)
            plan, length_KN = plan_of(0), positions_in(plan_of(0))
            if not packed:
                some = plan.in_order(np.arange(min(len(plan.bucket_S), NUM_PACKED)))
                plan = packing.pack(some, length_KN, unit, accumulation)
            print(f"data: {packing.describe(plan, length_KN, full_Kb, unit, packed)}")

    if kept:
        read = lambda row, speed, rng: _Example(kept.read(row), kept.frames_N[row])
    else:
        augmentation = data_config.augment
        read = _reader(
            corpus, rows_N, data_config, frontend, augmentation, skipped_path, host_index
        )

    def batch(step: int) -> Batch:
        plan, s = plan_step(step)
        mine = _share(plan.size_S[s], host_index, host_count)
        share = plan.batch(s, mine)
        examples = [
            read(row, speed, rng_of(AUGMENT, seed, step, i))
            for i, (row, speed) in enumerate(zip(share.rows, share.speed, strict=True), mine.start)
        ]
        b = share.bucket_S[0]
        made = _assemble(corpus, share.rows, examples, buckets[b], data_config, frontend, kept)
        rngs = (rng_of(PROMPT, seed, step, i) for i in range(mine.start, mine.stop))
        made |= own_parts(corpus, share.rows, widths[b], prompter, rngs, packed)
        if packed:
            names = "segments", "encoder_segments"
            length_KB = np.where(made["index"] >= 0, positions_with(*_in_llm(made)), 0)
            for name, length_B, slots in zip(names, length_KB, share.slots_SK[0], strict=False):
                rows = unit // host_count
                made[name] = packing.segments(length_B, rows, slots, accumulation)
        return made

    # What is kept is read from a mapped file: workers would only copy it.
    num_workers = 0 if kept else data_config.num_workers
    return _iterate(batch, start_step, num_steps, num_workers)


def for_evaluation(data_config: ConfigDict, **changes) -> ConfigDict:
    """The `data` part of a run's configuration as its evaluation takes it: audio that cannot be
    read is left out, no transcript is too long, and features are made on the host. `changes`: what
    is to be otherwise, these included."""
    data_config = data_config.copy_and_resolve_references()
    with data_config.unlocked():
        data_config.update({"on_bad_audio": "skip", "max_tokens": 0, "features": "host"} | changes)
    return data_config


def eval_batches(
    utterances: Sequence[Utterance],
    tokenizer,
    data_config: ConfigDict,
    *,
    batch_size: int,
    host_index: int = 0,
    host_count: int = 1,
    skipped_path: str | None = None,
    prompter: prompts.Prompter | None = None,
    frontend: features.Frontend = features.LOG_MEL,
) -> Iterator[Batch]:
    """Yields every utterance once, short ones first, without augmentation, with its task's first
    prompt.

    Arguments, batches and errors as for `train_batches`. Fillers make the number a multiple of the
    batch size: repeated utterances with index -1 and token_length 0. All hosts yield equally many
    batches.
    """
    corpus = make_corpus(utterances, tokenizer, prompter, data_config.window)
    rows_N = _within_token_limit(corpus, data_config, skipped_path if host_index == 0 else None)
    rows_N = rows_N[np.argsort(corpus.samples[rows_N], kind="stable")]
    frames_N, tokens_N = frames_of(corpus, rows_N), corpus.token_length[rows_N]
    buckets = choose_buckets(frames_N, tokens_N, data_config.num_buckets)
    widths = own_widths(corpus, rows_N, (1.0,), buckets)
    plan = deal(corpus, rows_N, np.ones(len(rows_N)), buckets, batch_size)
    mine = _share(batch_size, host_index, host_count)
    read = _reader(corpus, rows_N, data_config, frontend, None, skipped_path, host_index)

    def batch(step: int) -> Batch:
        share = plan.batch(step, mine)
        examples = [read(row, 1.0, None) for row in share.rows]
        b = share.bucket_S[0]
        made = _assemble(corpus, share.rows, examples, buckets[b], data_config, frontend)
        made |= own_parts(corpus, share.rows, widths[b], prompter, [None] * len(share.rows))
        made["index"] = np.where(share.repeated, -1, made["index"]).astype(np.int32)
        made["token_length"] = np.where(share.repeated, 0, made["token_length"]).astype(np.int32)
        return made

    return _iterate(batch, 0, len(plan.bucket_S), data_config.num_workers)


# ------------------------------------------------------------------------------------------------
# Which utterances, in which shape, at which step
# ------------------------------------------------------------------------------------------------


def _within_token_limit(corpus: Corpus, data_config, skipped_path) -> np.ndarray:
    """Rows of utterances whose transcripts are not over `max_tokens` (0: no limit)."""
    length_N, limit = corpus.token_length, data_config.max_tokens or np.inf
    problems = [
        Problem(
            "too_many_tokens", corpus.utterances[row].where, f"{length_N[row]} tokens: {limit=}"
        )
        for row in np.flatnonzero(length_N > limit)
    ]
    sources.handle(problems, data_config.on_bad_audio, skipped_path)
    rows_N = np.flatnonzero(length_N <= limit)
    if not len(rows_N):
        raise ValueError(f"every transcript is longer than data.max_tokens={limit}")
    return rows_N


def _share(batch_size: int, host_index: int, host_count: int) -> slice:
    """A host's rows of a batch. Raises ValueError if they are not as many for every host."""
    if batch_size % host_count:
        raise ValueError(f"batch_size={batch_size} does not divide among {host_count} hosts")
    share = batch_size // host_count
    return slice(host_index * share, (host_index + 1) * share)


# ------------------------------------------------------------------------------------------------
# What a batch holds
# ------------------------------------------------------------------------------------------------


class _Example(NamedTuple):
    """Speech of one utterance: frames [F, M], audio [N] or what is kept [S, E]; None: unusable.
    length: how much of it is valid; of what is kept, mel frames."""

    speech: np.ndarray | None
    length: int = 0


def _reader(
    corpus: Corpus, rows_N, data_config, frontend, augmentation, skipped_path, host_index
) -> Callable:
    """Returns read(row, speed, rng) -> _Example.

    augmentation: `data.augment`, or None. What does not change from epoch to epoch is kept in
    memory if all of it fits. It is then read here, by every host, and every unusable file is found
    before the first step. What training reads, or some of it, is looked at for what is odd.
    """
    odd = {}  # row: kinds of audio.ODDITIES, if there are any

    def load(row):
        try:
            sound = audio.listen(corpus.utterances[row])
        except BadAudio as error:
            return Problem(error.kind, corpus.utterances[row].where, error.reason)
        if sound.odd:
            odd[row] = sound.odd
        return sound.samples

    def finish(samples):
        if isinstance(samples, Problem):
            return samples
        if data_config.features == "step":
            return _Example(samples, len(samples))
        silence = max(corpus.window * features.HOP - len(samples), 0)
        frames = features.frames(frontend, np.pad(samples, (0, silence)))
        spoken = features.num_frames(len(samples))
        return _Example(frames, spoken if data_config.window_masked else len(frames))

    noises, impulses = (
        sources.read_manifest(path, require_text=False) if path else []
        for path in (augmentation and (augmentation.noise, augmentation.rir)) or ("", "")
    )
    fixed = not augmentation or not (noises or impulses or tuple(augmentation.speeds) != (1.0,))
    keep = (lambda row: finish(load(row))) if fixed else load
    kept, handled = {}, set()
    size = corpus.samples[rows_N].sum() * 4
    if fixed and data_config.features == "host":
        size = frames_of(corpus, rows_N).sum() * frontend.width * 4
    if size <= MEMORY_BYTES and not data_config.num_workers:  # every worker would keep its own
        kept = dict(zip(rows_N, sources.in_threads(keep, rows_N, "reading audio"), strict=True))
        problems = {row: found for row, found in kept.items() if isinstance(found, Problem)}
        path = skipped_path if host_index == 0 else None
        sources.handle(problems.values(), data_config.on_bad_audio, path)
        handled = set(problems)
    if augmentation is not None and host_index == 0:
        heard_N = rows_N if kept else rows_N[:: max(len(rows_N) // NUM_HEARD, 1)]
        if not kept:
            sources.in_threads(load, heard_N, "looking at audio")
        found = [(corpus.utterances[row].where, odd[row]) for row in sorted(odd)]
        for line in audio.report(found, len(heard_N)):
            print(line)

    def read(row, speed, rng):
        found = kept[row] if kept else keep(row)
        if isinstance(found, Problem):
            if row not in handled:
                handled.add(row)
                sources.handle([found], data_config.on_bad_audio, skipped_path)
            return _Example(None)
        if fixed:
            return found
        samples = augment.change_speed(found, speed)
        try:
            samples = augment.augment(samples, rng, augmentation, noises, impulses)
        except BadAudio as error:  # of a noise or an impulse response
            if error.where not in handled:
                handled.add(error.where)
                problem = Problem(error.kind, error.where, error.reason)
                sources.handle([problem], data_config.on_bad_audio, skipped_path)
        return finish(samples)

    return read


def _assemble(corpus: Corpus, rows_B, examples, bucket, data_config, frontend, kept=None) -> Batch:
    (frames, tokens), size = bucket, len(rows_B)
    length, dtype = "mel_length", np.float32
    if kept:
        speech, shape, dtype = "encoded", (kept.positions(frames), kept.width), kept.dtype
    elif data_config.features == "host":
        speech, shape = "mel", (frames, frontend.width)
    else:
        speech, length, shape = "audio", "audio_length", (frames * features.HOP,)
    batch = {
        speech: np.zeros((size, *shape), dtype),
        length: np.full(size, frames if kept else shape[0], np.int32),
        "tokens": np.zeros((size, tokens), np.int32),
        "token_length": np.zeros(size, np.int32),
        "index": np.full(size, -1, np.int32),
    }
    for i, (row, example) in enumerate(zip(rows_B, examples, strict=True)):
        if example.speech is not None:
            answer = corpus.answer(row)
            batch[speech][i, : len(example.speech)] = example.speech
            batch[length][i] = example.length
            batch["tokens"][i, : len(answer)] = answer
            batch["token_length"][i] = len(answer)
            batch["index"][i] = row
    return batch


def _in_llm(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """int [B] each: the frames of a batch's rows, and the LLM's positions around them that are
    theirs, prompts and answers."""
    if "audio_length" in batch:
        frames_B = features.num_frames(batch["audio_length"])
    else:
        frames_B = batch["mel_length"]
    own = sum(batch.get(f"{name}_length", 0) for name in ("prefix", "suffix"))
    return frames_B, own + batch["token_length"]


def _iterate(batch: Callable[[int], Batch], start: int, stop: int, num_workers: int):
    """batch(start), …, batch(stop - 1), made ahead of use by threads or by worker processes."""
    threads = grain.ReadOptions(num_threads=1 if num_workers else 2, prefetch_buffer_size=4)
    dataset = grain.MapDataset.range(start, stop).map(batch).to_iter_dataset(threads)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read its flags
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options)
    iterator = iter(dataset)
    try:
        for made in iterator:
            # What comes from a worker lies in shared memory that must not outlive the iterator.
            yield {key: np.array(value) for key, value in made.items()} if num_workers else made
    finally:
        iterator.close()  # or worker processes and their shared memory would outlive it
