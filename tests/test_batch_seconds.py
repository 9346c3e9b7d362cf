"""Batches by duration: shapes of about equal cost, exact epochs, the same for every host."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile

from otreg_jax import config as config_lib
from otreg_jax.data import bucketing, features, pipeline, sources


class Letters:
    """A tokenizer with a token a letter."""

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """93 recordings of 0.05 to 0.8 s in two languages, many short ones."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(93):
        samples = int(800 * 16 ** rng.uniform())
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(samples), 16000)
        text = "".join(rng.choice(list("abcdef"), size=1 + samples // 1500))
        line = {"audio_filepath": f"{i}.wav", "text": text, "duration": samples / 16000}
        lines.append(json.dumps(line | {"lang": "en" if i % 3 else "nl"}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return sources.read_manifest(folder / "train.jsonl")


SECONDS, UNIT = 3.0, 2


def batches(corpus, steps, *, start=0, host=0, hosts=1, **changes):
    config = config_lib.default().data
    config.update_from_flattened_dict({"num_buckets": 4, **changes})
    return list(
        pipeline.train_batches(
            corpus,
            Letters(),
            config,
            batch_size=8,
            batch_seconds=SECONDS,
            unit=UNIT,
            seed=3,
            num_steps=steps,
            start_step=start,
            host_index=host,
            host_count=hosts,
        )
    )


def seconds_of(batch):
    rows, frames, _ = batch["mel"].shape
    return rows * frames / features.FRAME_RATE


IRREGULAR = {"augment.speeds": (0.9, 1.0, 1.1), "mixture": "lang", "temperature": 2.0}


def test_steps_cost_about_the_same_and_rows_are_whole_units(corpus, capsys):
    found = batches(corpus, 40)
    sizes = {batch["mel"].shape[:2] for batch in found}
    assert len(sizes) == 4 and all(rows % UNIT == 0 for rows, _ in sizes)
    assert len({rows for rows, _ in sizes}) == 4  # the shorter, the more
    for batch in found:
        unit = UNIT * batch["mel"].shape[1] / features.FRAME_RATE
        assert SECONDS - unit < seconds_of(batch) <= SECONDS
    printed = capsys.readouterr().out
    for rows, frames in sizes:
        assert f"bucket of {frames} frames" in printed and f"{rows} rows each" in printed


def test_every_epoch_holds_every_utterance(corpus):
    found = batches(corpus, 60)
    rows = np.concatenate([batch["index"] for batch in found])
    ends = np.cumsum([len(batch["index"]) for batch in found])
    widest = min(len(batch["index"]) for batch in found)
    # An epoch: what is repeated fills the last batch of the widest shape, and no more.
    epoch = next(i for i, end in enumerate(ends, 1) if set(rows[:end]) == set(range(93)))
    for i in range(60 // epoch):
        start = ends[i * epoch - 1] if i else 0
        counts = Counter(rows[start : ends[(i + 1) * epoch - 1]].tolist())
        assert set(counts) == set(range(93)) and counts.total() < 93 + widest


@pytest.mark.parametrize("changes", [{}, IRREGULAR], ids=["plain", "mixture and speeds"])
def test_the_same_from_any_number_of_hosts_and_after_a_restart(corpus, changes):
    whole = batches(corpus, 40, **changes)
    shares = [batches(corpus, 40, host=host, hosts=2, **changes) for host in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([p[key] for p in parts]))
    for start in (1, 13, 39):
        again = batches(corpus, 40, start=start, **changes)
        for batch, other in zip(whole[start:], again, strict=True):
            assert all(np.array_equal(batch[key], other[key]) for key in batch)
    if changes:
        assert len({batch["index"].tobytes() for batch in whole}) == 40


def test_the_same_from_worker_processes(corpus):
    whole, made = batches(corpus, 12, **IRREGULAR), batches(corpus, 12, num_workers=1, **IRREGULAR)
    for batch, other in zip(whole, made, strict=True):
        assert all(np.array_equal(batch[key], other[key]) for key in batch)


def test_seconds_that_hold_no_batch_of_the_longest_are_refused():
    buckets = ((100, 5), (3000, 40))
    assert bucketing.rows_by_seconds(buckets, 240, 8) == (240, 8)
    assert bucketing.rows_by_seconds(buckets, 247.9, 8) == (240, 8)
    with pytest.raises(ValueError, match="batch_seconds=239: .*30 s.*8 of them.*240 s at least"):
        bucketing.rows_by_seconds(buckets, 239, 8)


def test_hosts_that_cannot_share_every_batch_are_refused(corpus):
    with pytest.raises(ValueError, match="does not divide among 3 hosts"):
        batches(corpus, 1, hosts=3)
