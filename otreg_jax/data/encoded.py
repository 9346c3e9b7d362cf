"""The outputs of a frozen speech encoder, kept on disk between epochs and runs.

Where the encoder is frozen and nothing random comes before it, every epoch computes the same. Here
it is computed once, in shards of utterances of similar length, named by a fingerprint of all that
goes in: the encoder's weights, the audio files and how they are cut. What is there is used again,
also by another run; what an interrupted pass has finished, stays.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import tqdm

from otreg_jax import rundir
from otreg_jax.data import features, pipeline
from otreg_jax.data.sources import Utterance

SHARD_SIZE = 1024  # utterances; more where a manifest would make over MAX_SHARDS: each is compiled
MAX_SHARDS = 16


class Kept(NamedTuple):
    """The kept outputs of N utterances.

    shards: memory-mapped arrays [positions, E], the utterances of a shard one after another.
    shard_N, start_N: where each utterance's outputs begin. frames_N: its mel frames; 0: its audio
      could not be read. positions: mel frames -> the encoder's positions.
    """

    shards: Sequence[np.ndarray]
    shard_N: np.ndarray
    start_N: np.ndarray
    frames_N: np.ndarray
    positions: Callable[[int], int]

    @property
    def width(self) -> int:
        return self.shards[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.shards[0].dtype

    def read(self, row: int) -> np.ndarray | None:
        """The outputs [S, E] of an utterance; None if its audio could not be read."""
        if not self.frames_N[row]:
            return None
        start = self.start_N[row]
        size = self.positions(self.frames_N[row])
        return self.shards[self.shard_N[row]][start : start + size]


def keep(
    utterances: Sequence[Utterance],
    tokenizer,
    data_config,
    folder: str | os.PathLike,
    *,
    encode: Callable,
    positions: Callable,
    frontend: features.Frontend,
    fingerprint: str,
    batch_size: int,
    host_index: int,
    host_count: int,
    is_writer: bool,
    wait: Callable[[], None],
    skipped_path: str | None = None,
) -> Kept:
    """Reads the encoder's outputs from `folder`, after computing those that are not there.

    Args:
      utterances, tokenizer, data_config, frontend, batch_size, host_index, host_count,
        skipped_path: as for `pipeline.train_batches`.
      folder: a local one that all processes see; process 0 writes (`is_writer`).
      encode: this host's rows of a batch -> outputs [B, S, E] and "index" [B] of all hosts' rows.
      positions: mel frames -> the encoder's positions, an int or an array of them.
      fingerprint: of the encoder's weights and what it computes in.
      wait: returns once all processes have called it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recording_N, first_R = _recordings(utterances)
    utterances = [utterances[i] for i in first_R]
    rows = _shards(utterances)
    name_of = lambda part: _name(part, data_config, frontend, fingerprint)
    names = [name_of([utterances[i] for i in part]) for part in rows]
    missing = [k for k, name in enumerate(names) if not (folder / f"{name}.json").exists()]
    wait()  # all have looked before the first writes
    settings = pipeline.for_evaluation(
        data_config, on_bad_audio=data_config.on_bad_audio, num_buckets=1, num_workers=0
    )
    batches_of = functools.partial(
        pipeline.eval_batches,
        tokenizer=tokenizer,
        data_config=settings,
        batch_size=batch_size,
        host_index=host_index,
        host_count=host_count,
        skipped_path=skipped_path,
        frontend=frontend,
    )
    count = sum(len(rows[k]) for k in missing)
    progress = tqdm.tqdm(total=count, desc="encoding speech once", unit="utt", disable=not count)
    for k in missing:
        part = [utterances[i] for i in rows[k]]
        found = _encode_shard(len(part), batches_of(part), encode, progress)
        if is_writer:
            _write_shard(folder / names[k], found, positions)
    progress.close()
    wait()
    shards, frames_N = [], np.zeros(len(utterances), np.int64)
    shard_N, start_N = np.zeros_like(frames_N), np.zeros_like(frames_N)
    for k, (name, part) in enumerate(zip(names, rows, strict=True)):
        described = json.loads((folder / f"{name}.json").read_text())
        frames = np.array(described["frames"])
        frames_N[part], shard_N[part] = frames, k
        lengths = np.where(frames > 0, positions(frames), 0)
        start_N[part] = np.cumsum(lengths) - lengths
        array = np.load(folder / f"{name}.npy", mmap_mode="r")
        bfloat16 = described["dtype"] == "bfloat16"  # of which .npy files know nothing
        shards.append(array.view(ml_dtypes.bfloat16) if bfloat16 else array)
    own = lambda of_R: of_R[recording_N]
    return Kept(shards, own(shard_N), own(start_N), own(frames_N), positions)


def _recordings(utterances: Sequence[Utterance]) -> tuple[np.ndarray, np.ndarray]:
    """Which recording each utterance is, and the first row of each: what serves several tasks is
    encoded once."""
    number = {}
    heard = [(u.audio, u.offset, u.duration) for u in utterances]
    recording_N = np.array([number.setdefault(key, len(number)) for key in heard])
    return recording_N, np.unique(recording_N, return_index=True)[1]


def _shards(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    """Rows of each shard: of one manifest, so that a run on others too finds it again, and of
    similar length."""
    duration_N = np.array([u.duration for u in utterances])
    corpus_N = np.array([u.where.rpartition(":")[0] for u in utterances])
    shards = []
    for corpus in np.unique(corpus_N):
        rows = np.flatnonzero(corpus_N == corpus)
        rows = rows[np.argsort(duration_N[rows], kind="stable")]
        size = max(SHARD_SIZE, -(-len(rows) // MAX_SHARDS))
        shards += [rows[start : start + size] for start in range(0, len(rows), size)]
    return shards


def _name(utterances: Sequence[Utterance], data_config, frontend, fingerprint: str) -> str:
    def file_of(u: Utterance):
        stat = os.stat(u.audio) if os.path.exists(u.audio) else None
        return u.audio, stat and (stat.st_size, stat.st_mtime_ns), u.offset, u.duration

    made_of = [fingerprint, frontend.width, [file_of(u) for u in utterances]]
    if frontend.kind != "log_mel":
        made_of.append(frontend.kind)
    if data_config.window:
        made_of.append((data_config.window, data_config.window_masked))
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]


def _encode_shard(count: int, batches, encode: Callable, progress) -> list:
    """[(frames, outputs [S, E] of the bucket's size) or None, ...] of `count` utterances, in the
    order in which `batches` counts them."""
    found = [None] * count
    for batch in batches:
        encoded_BSE, frames_B, index_B = encode(batch)
        for encoded_SE, frames, i in zip(encoded_BSE, frames_B, index_B, strict=True):
            if i >= 0:
                found[i] = (int(frames), encoded_SE)
                progress.update()
    return found


def _write_shard(path: Path, found, positions) -> None:
    frames = [item[0] if item else 0 for item in found]
    parts = [item[1][: positions(item[0])] for item in found if item]
    array = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    dtype = str(array.dtype)
    array = array.view(np.uint16) if dtype == "bfloat16" else array
    # Runs side by side may compute the same: each writes a file of its own.
    unfinished = path.with_suffix(f".{os.getpid()}.npy")
    np.save(unfinished, array)
    unfinished.rename(path.with_suffix(".npy"))
    rundir.write_json(path.with_suffix(".json"), {"dtype": dtype, "frames": frames})
