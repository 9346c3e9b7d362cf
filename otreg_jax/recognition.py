"""Recognition of many utterances by a trained model: batches, hypotheses, what was done so far.

What the commands evaluate, transcribe and align share.
"""

import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from otreg_jax import alignment, cluster, decoding, metrics, rundir, sharding
from otreg_jax.data import features, pipeline, prompts, sets, sources
from otreg_jax.models import encoders
from otreg_jax.models import slm as slm_lib

PUBLISH_SECONDS = 60


class Partial:
    """What an interrupted evaluation has decoded so far, kept in a JSON-lines file.

    The first line says of what; another checkpoint or other settings start afresh. A remote file is
    written every PUBLISH_SECONDS.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any]):
        self.path, self.settings = path, settings

    def __enter__(self) -> "Partial":
        stored = _stored_lines(self.path) if jax.process_index() == 0 else []
        lines = json.loads(from_process_0(rundir.dumps(stored)))
        self.rows = lines[1:] if lines[:1] == [self.settings] else []
        self.file, self.published = None, time.monotonic()
        if jax.process_index() == 0:
            self.file = rundir.Appended(self.path, _packed([self.settings, *self.rows]))
        return self

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.file is None:
            return
        self.file.add(_packed(rows))
        if time.monotonic() > self.published + PUBLISH_SECONDS:
            self.file.publish()
            self.published = time.monotonic()

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.publish()


def _packed(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(rundir.dumps(row) + "\n" for row in rows).encode()


def _stored_lines(path) -> list[dict]:
    try:
        return rundir.read_lines(path, "starting afresh")
    except ValueError as error:
        print(error)
        return []


def decode_sets(
    run,
    utterances: sets.Sets,
    settings: decoding.Settings,
    layer: int,
    batch_size: int,
    skipped_path: str | os.PathLike,
    label: str,
    partial: Partial,
    style: str = "whisper",
) -> tuple[list[dict[str, Any]], dict[str, list[alignment.Sample]]]:
    """Decodes all sets in one pass over few batch shapes.

    Returns:
      rows: {"set", "id", "reference", "hypothesis", "errors", "words", "score", "unfinished",
        "lang"} in the order of the sets, errors and words as `style` normalises, and what was asked
        ("task", the words of "context"); utterances whose audio cannot be read are missing.
      samples: the first alignment.NUM_MEASURED utterances of each set.
    """
    everything = [(name, u) for name, found in utterances.items() for u in found]
    ends = np.cumsum([len(found) for found in utterances.values()])
    sampled = {
        i
        for end, found in zip(ends.tolist(), utterances.values(), strict=True)
        for i in range(end - len(found), end)[: alignment.NUM_MEASURED]
    }
    known = {(row["set"], row["id"]): row for row in partial.rows}
    rows = {i: known[name, u.id] for i, (name, u) in enumerate(everything) if (name, u.id) in known}
    prompter = prompts.make(run.config, run.tokenizer)
    pending = [i for i in range(len(everything)) if i not in rows or i in sampled]
    samples = {name: {} for name in utterances}
    selected = [everything[i][1] for i in pending]
    params = decoding.for_run(run.slm, run.params)
    frontend = encoders.frontend(run.slm.encoder.config)
    for batch in batches(run, selected, batch_size, label, skipped_path):
        decoded, compared = recognize_and_embed(run.slm, params, batch, settings, layer)
        tokens_BN, length_B, score_B, finished_B, index_B = sharding.to_host(
            (*decoded, batch["index"])
        )
        # Negative: filler, or unreadable audio.
        found = [(b, pending[i]) for b, i in enumerate(index_B.tolist()) if i >= 0]
        if any(i in sampled for _, i in found):
            batch, compared = sharding.to_host((batch, compared))
        for b, i in found:
            name, utterance = everything[i]
            hypothesis = run.tokenizer.decode(tokens_BN[b, : length_B[b]].tolist()).strip()
            rows[i] = _row(name, utterance, prompter, hypothesis, style) | {
                "score": float(score_B[b]),
                "unfinished": not finished_B[b],
            }
            if i in sampled:
                samples[name][i] = alignment.sample_of(
                    utterance, run.tokenizer, batch, compared, b, frontend
                )
        partial.add([rows[i] for _, i in found])
    in_order = {
        name: [found[i] for i in sorted(found) if len(found[i].ids_T)]
        for name, found in samples.items()
    }
    return [rows[i] for i in sorted(rows)], in_order


def batches(
    run, utterances: Sequence[sources.Utterance], batch_size: int, label: str, skipped_path=None
) -> Iterator[dict[str, jax.Array]]:
    """The utterances as global batches on the run's mesh, under a progress bar named `label`.

    Audio that cannot be read is left out and listed in `skipped_path`.
    """
    # A batch shape must be worth its compilation.
    num_buckets = min(run.config.data.num_buckets, 1 + len(utterances) // 512)
    data_config = pipeline.for_evaluation(run.config.data, num_buckets=num_buckets)
    shards = sharding.batch_shards(run.mesh.shape)
    batch_size = -(-batch_size // shards) * shards
    host_index, host_count = cluster.batch_share(run.mesh)
    host_batches = pipeline.eval_batches(
        utterances,
        run.tokenizer,
        data_config,
        batch_size=batch_size,
        host_index=host_index,
        host_count=host_count,
        skipped_path=skipped_path and str(skipped_path),
        prompter=prompts.make(run.config, run.tokenizer, utterances),
        frontend=encoders.frontend(run.slm.encoder.config),
    )
    total = -(-len(utterances) // batch_size)
    for host_batch in tqdm.tqdm(host_batches, desc=label, total=total, unit="batch"):
        yield sharding.to_global(host_batch, run.mesh)


def aligned(
    run, utterances: Sequence[sources.Utterance], batch_size: int = 16
) -> Iterator[tuple[sources.Utterance, list[alignment.Word]]]:
    """Yields every utterance with the words of its transcript, timed in seconds.

    Audio that cannot be read is left out and printed.
    """
    for batch in batches(run, utterances, batch_size, "aligning"):
        found = alignment.token_shares(run.slm, run.params, batch, run.config.otreg.layer)
        _, length_B = slm_lib.transcript_of(batch)
        rows = sharding.to_host((*found, batch["mel_length"], length_B, batch["index"]))
        for shares_ST, silence_S, length, frames, num_tokens, i in zip(*rows, strict=True):
            if i < 0 or not num_tokens:
                continue
            text, lang = utterances[i].text, utterances[i].lang
            words = alignment.words_of(
                text,
                alignment.units(text, lang),
                run.tokenizer.begins(text),
                shares_ST[:length, :num_tokens],
                silence_S[:length],
            )
            seconds = frames / features.FRAME_RATE / length
            yield (
                utterances[i],
                [w._replace(start=w.start * seconds, end=w.end * seconds) for w in words],
            )


@functools.partial(jax.jit, static_argnames=("slm", "settings", "layer"))
def recognize_and_embed(slm, params, batch, settings, layer: int):
    """Hypotheses, and the embeddings that OTReg at `layer` compares; the encoder runs once."""
    out = slm_lib.forward(slm, params, batch, layer)
    mel, prompt = (batch["mel"], batch["mel_length"]), slm_lib.prompt_of(batch)
    decoded = decoding.recognize(slm, params, *mel, settings, prompt=prompt)
    return decoded, (out.speech_BSD, out.speech_length_B, out.text_BTD)


def _row(name, utterance, prompter, hypothesis: str, style: str) -> dict[str, Any]:
    reference, lang = prompts.answer(prompter, utterance), prompts.language_of(utterance)
    words, _ = metrics.normalized_counts([reference], [hypothesis], [lang], style)
    asked = {"task": utterance.task, "context": prompts.context_of(utterance)}
    return {key: value for key, value in asked.items() if value} | {
        "set": name,
        "id": utterance.id,
        "reference": reference,
        "hypothesis": hypothesis,
        "errors": int(words.errors[0]),
        "words": int(words.lengths[0]),
        "lang": lang,
    }


def from_process_0(text: str) -> str:
    """The text that process 0 has, on every process: they must agree on what is left to do."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    if not size:
        return ""
    data = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes().decode()
