"""How long a start takes, and how much memory, with so many utterances on disk.

    python -m benchmarks.data --part=startup                   # 10 million made-up ones
    python -m benchmarks.data --part=startup --utterances=200000

A manifest names slices of a few real recordings; texts of 4 to 30 words, four languages. Processes
of their own do what training does up to its first batch, by its own functions: read, check and
compare the data, tokenize, choose shapes, plan the epoch, read audio. The first one makes the
index, the second one finds it. Seconds are by the wall clock, imports included. Memory is the most
that was resident, pages of mapped files included; `own` leaves these out, at the end.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
from ml_collections import ConfigDict

from otreg_jax import config as config_lib
from otreg_jax import rundir, train
from otreg_jax.data import embedded, pipeline, tokenization

LANGUAGES = ("de", "en", "fr", "nl")
SECONDS = 20  # recordings of 1, 2, ... seconds
BLOCK = 10_000


def write_manifest(folder: Path, count: int) -> None:
    """recordings, train.jsonl of `count` utterances, and a tokenizer of their words."""
    rng = np.random.default_rng(0)
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]
    words = sorted({"".join(rng.choice(syllables, size=1 + i % 4)) for i in range(5000)})
    audio = []
    for seconds in range(1, SECONDS + 1):
        path = folder / f"{seconds}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(16000 * seconds).clip(-3, 3), 16000)
        audio.append(embedded.slice_address(str(path), 0, path.stat().st_size))
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, count, BLOCK):
            rows = range(start, min(start + BLOCK, count))
            seconds_N = rng.integers(1, SECONDS + 1, size=len(rows))
            ends_N = np.cumsum(4 + (seconds_N * rng.uniform(0.3, 1.3, size=len(rows))).astype(int))
            said = np.array(words)[rng.integers(len(words), size=ends_N[-1])].tolist()
            begins_N = np.concatenate([[0], ends_N[:-1]])
            for row, begin, end, seconds in zip(rows, begins_N, ends_N, seconds_N, strict=True):
                file.write(
                    f'{{"id": "u{row}", "audio_filepath": "{audio[seconds - 1]}", "duration": '
                    f'{seconds}, "lang": "{LANGUAGES[row % 4]}", "speaker": "s{row % 997}", '
                    f'"text": "{" ".join(said[begin:end])}"}}\n'
                )
    tokenization.train_sentencepiece(words, folder / "tokenizer", 500)


def settings(folder: Path) -> ConfigDict:
    config = config_lib.default()
    config.data.train, config.data.cache = str(folder / "train.jsonl"), str(folder / "cache")
    config.tokenizer.path = str(folder / "tokenizer.model")
    config.data.num_buckets, config.batch_size = 8, 64
    config.ctc.weight, config.ctc.classes = 0.3, "used"
    return config


def start(folder: Path, workdir: Path) -> dict:
    """What training does up to its first batch; seconds of each part, memory in MiB."""
    laps, last = {}, time.time()

    def lap(name):
        nonlocal last
        laps[name], last = round(time.time() - last, 2), time.time()

    config = settings(folder)
    data = train.load_data(config, rundir.of(workdir))
    lap("read, check, compare, tokenize")
    batches = pipeline.train_batches(
        data.train,
        data.tokenizer,
        config.data,
        batch_size=config.batch_size,
        seed=0,
        num_steps=10**9,
        prompter=data.prompter,
        corpus=data.corpus,
    )
    batch = next(batches)
    lap("shapes, plan, first batch")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "utterances": len(data.train),
        "seconds": laps,
        "cpu_seconds": round(time.process_time(), 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "own_mib_at_the_end": int(status["RssAnon"].split()[0]) // 1024,
        "first_batch": batch["index"].tolist(),
    }


def measure(folder: Path, count: int) -> dict:
    """The first start and the second one, each in a process of its own."""
    began = time.time()
    write_manifest(folder, count)
    results = {"written_in_seconds": round(time.time() - began, 1)}
    results["manifest_mib"] = (folder / "train.jsonl").stat().st_size // 2**20
    for name in ("first", "second"):
        began = time.time()
        command = [sys.executable, "-m", "benchmarks.startup", str(folder), str(folder / name)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        whole = round(time.time() - began, 1)
        results[name] = {"whole_seconds": whole, **json.loads(said.splitlines()[-1])}
    assert results["first"].pop("first_batch") == results["second"].pop("first_batch")
    index = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    return results | {"index_mib": index // 2**20}


if __name__ == "__main__":
    print(json.dumps(start(Path(sys.argv[1]), Path(sys.argv[2]))), flush=True)
    os._exit(0)  # batches that are read ahead are not waited for
