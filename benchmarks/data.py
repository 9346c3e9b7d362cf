"""How fast, how tight and how steady the data pipeline is, beside a plain PyTorch DataLoader.

    python -m benchmarks.data --manifest=train.jsonl
    python -m benchmarks.data --manifest=train.jsonl --part=memory --num_batches=20000
    python -m benchmarks.data --part=startup

Needs the `bench` extra (PyTorch). The corpus is a manifest of yours; it is copied to FLAC and to
ArrayRecord files in a temporary folder. Rates are seconds of audio per second of CPU time of all
threads ("per core"), which other load on the machine hardly touches. Prints JSON and writes it to
benchmarks/results/data.json, part by part.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import soundfile
from absl import app, flags

from benchmarks import startup
from benchmarks.common import describe_machine
from otreg_jax import config as config_lib
from otreg_jax import packing
from otreg_jax.data import bucketing, features, pipeline, prepare, sources, tokenization

_MANIFEST = flags.DEFINE_list("manifest", [], "Corpus to measure with.")
_PARTS = flags.DEFINE_multi_enum(
    "part",
    ["speed", "padding", "durations", "memory"],
    ["speed", "padding", "durations", "memory", "startup"],
    "What to measure.",
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "Of transcripts, for padding; by default bytes.")
_LIMIT = flags.DEFINE_integer("limit", 800, "Utterances to measure speed with.")
_REPEATS = flags.DEFINE_integer(
    "repeats", 3, "Times that every speed is measured; the median counts."
)
_NUM_BATCHES = flags.DEFINE_integer("num_batches", 20000, "Batches to read for the memory curve.")
_UTTERANCES = flags.DEFINE_integer("utterances", 10**7, "Made-up ones, for startup.")
_OUT = flags.DEFINE_string("out", "benchmarks/results/data.json", "File of the results.")


POSITION_FRAMES = 8  # of an LLM that reads 12.5 positions a second


class Bytes:
    """A tokenizer with a token a byte."""

    def encode(self, text):
        return list(text.encode())


def tokenizer():
    return tokenization.load_tokenizer(_TOKENIZER.value) if _TOKENIZER.value else Bytes()


def data_config(**changes):
    config = config_lib.default().data
    config.update_from_flattened_dict({"num_buckets": 8, **changes})
    return config


def copies(utterances, folder):
    """The same utterances from FLAC files and from ArrayRecord files."""
    flac = []
    for i, utterance in enumerate(utterances):
        path = str(folder / f"{i}.flac")
        soundfile.write(path, sources.load_audio(utterance), sources.SAMPLE_RATE)
        flac.append(utterance._replace(audio=path))
    prepare.prepare(utterances, [], folder / "records", "train", shard_hours=0.25, workers=2)
    records, problems = sources.scan(str(folder / "records"))
    assert len(records) == len(utterances) and not problems
    return {"manifest": utterances, "flac": flac, "array_record": records}


# ---- speed ---------------------------------------------------------------------------------------


def per_cpu_second(work, seconds: float) -> float:
    """Seconds of audio that `work` gets through in a second of CPU time."""
    rates = []
    for _ in range(_REPEATS.value):
        start = time.process_time()
        work()
        rates.append(seconds / (time.process_time() - start))
    return round(statistics.median(rates))


def torch_loader(utterances, batch_size: int, num_workers: int):
    """A plain PyTorch loader: read, log-mel by torch.stft, shuffle, pad to the longest."""
    import torch

    filters = torch.from_numpy(features.mel_filters(80).T.copy())
    window = torch.hann_window(400)

    class Recordings(torch.utils.data.Dataset):
        def __len__(self):
            return len(utterances)

        def __getitem__(self, i):
            audio, _ = soundfile.read(utterances[i].audio, dtype="float32")
            stft = torch.stft(torch.from_numpy(audio), 400, 160, window=window, return_complex=True)
            log_mel = torch.clamp(filters @ stft[..., :-1].abs() ** 2, min=1e-10).log10()
            log_mel = (torch.maximum(log_mel, log_mel.max() - 8.0) + 4.0) / 4.0
            return log_mel.T, torch.tensor(list(utterances[i].text.encode()))

    def collate(examples):
        mels, tokens = zip(*examples, strict=True)
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "mel": pad(mels, batch_first=True),
            "mel_length": torch.tensor([len(mel) for mel in mels]),
            "tokens": pad(tokens, batch_first=True),
        }

    torch.set_num_threads(1)
    return torch.utils.data.DataLoader(
        Recordings(), batch_size, shuffle=True, num_workers=num_workers, collate_fn=collate
    )


def our_loader(utterances, batch_size: int, num_workers: int, **changes):
    pipeline.MEMORY_BYTES = 0  # every epoch reads its audio again, as a large corpus must
    steps = -(-len(utterances) // batch_size)
    config = data_config(num_workers=num_workers, **changes)
    return pipeline.train_batches(
        utterances, Bytes(), config, batch_size=batch_size, seed=0, num_steps=steps
    )


def drain(loader):
    for _ in loader:
        pass


def measure_speed(variants) -> dict:
    seconds = sum(u.duration for u in variants["manifest"])
    audio = [sources.load_audio(u) for u in variants["manifest"]]
    rates = {
        "log_mel_80": per_cpu_second(lambda: [features.log_mel(a) for a in audio], seconds),
        "log_mel_128": per_cpu_second(lambda: [features.log_mel(a, 128) for a in audio], seconds),
    }
    for name, utterances in variants.items():
        load = lambda utterances=utterances: [sources.load_audio(u) for u in utterances]
        rates[f"read_{name}"] = per_cpu_second(load, seconds)
    # Loaders take turns, so that a slow minute of the machine meets all of them.
    for name, utterances in variants.items():
        ours = lambda utterances=utterances: drain(our_loader(utterances, 16, 0))
        rates[f"batches_{name}"] = per_cpu_second(ours, seconds)
        if name != "array_record":
            torch = lambda utterances=utterances: drain(torch_loader(utterances, 16, 0))
            rates[f"batches_torch_{name}"] = per_cpu_second(torch, seconds)
    in_step = lambda: drain(our_loader(variants["array_record"], 16, 0, features="step"))
    rates["batches_array_record_features_in_step"] = per_cpu_second(in_step, seconds)
    for name in ("manifest", "flac"):
        torch_rate = rates[f"batches_torch_{name}"]
        rates[f"ratio_same_files_{name}"] = round(rates[f"batches_{name}"] / torch_rate, 2)
        rates[f"ratio_array_record_to_torch_{name}"] = round(
            rates["batches_array_record"] / torch_rate, 2
        )
    return {
        "audio_seconds_per_cpu_second": rates,
        "utterances": len(audio),
        "hours": seconds / 3600,
    }


# ---- padding -------------------------------------------------------------------------------------


def measure_padding(utterances, batch_size: int = 16) -> dict:
    """Fractions of all mel frames in an epoch's batches that are padding."""
    corpus = bucketing.make_corpus(utterances, tokenizer())
    frames = bucketing.frames_of(corpus, np.arange(len(utterances)))
    ratios = {}
    for num_buckets in (1, 2, 4, 8, 16):
        buckets = bucketing.choose_buckets(frames, corpus.token_length, num_buckets)
        order = np.random.default_rng(0).permutation(len(utterances))
        plan = bucketing.deal(corpus, order, np.ones(len(order)), buckets, batch_size)
        ratios[f"{num_buckets}_shapes"] = round(bucketing.padding(corpus, buckets, plan)[0], 4)
    whole = np.random.default_rng(0).permutation(frames)
    whole = whole[: len(whole) // batch_size * batch_size].reshape(-1, batch_size)
    ratios["random_order_padded_to_the_longest"] = round(
        float(1 - whole.sum() / (whole.max(axis=1).sum() * batch_size)), 4
    )
    return {"batch_size": batch_size, "utterances": len(utterances), "padding": ratios}


def measure_durations(utterances, batch_size: int = 16) -> dict:
    """Batches of `batch_size` rows beside batches of as many seconds as the longest of those holds,
    and of a quarter: padding of frames, of tokens and of the LLM's positions (a token, or
    POSITION_FRAMES), unpacked and packed, audio a step, the longest step over the mean."""
    corpus = bucketing.make_corpus(utterances, tokenizer())
    frames = bucketing.frames_of(corpus, np.arange(len(utterances)))
    order, rows = np.random.default_rng(0).permutation(len(utterances)), []
    for num_buckets in (4, 6, 8, 16):
        buckets = bucketing.choose_buckets(frames, corpus.token_length, num_buckets)
        widths = np.array([width for width, _ in buckets]) / features.FRAME_RATE
        most = batch_size * widths[-1]
        for seconds in (0, most / 4, most):
            size = bucketing.rows_by_seconds(buckets, seconds, 1) if seconds else batch_size
            plan = bucketing.deal(corpus, order, np.ones(len(order)), buckets, size)
            held = plan.size_S * widths[plan.bucket_S]
            padding = bucketing.padding(corpus, buckets, plan)
            positions = np.array([f / POSITION_FRAMES + t for f, t in buckets])[plan.bucket_S]
            used = frames[plan.rows] / POSITION_FRAMES + corpus.token_length[plan.rows]
            packed = packing.pack(plan, np.ceil(used).astype(int)[None], 1)
            rows.append(
                {
                    "shapes": num_buckets,
                    "batch_seconds": round(float(seconds), 1),
                    "padding": round(padding[0], 4),
                    "padding_tokens": round(padding[1], 4),
                    "padding_positions": round(
                        float(1 - used.sum() / (positions * plan.size_S).sum()), 4
                    ),
                    "padding_packed": round(float(1 - used.sum() / packed.slots_SK.sum()), 4),
                    "steps": len(held),
                    "audio_seconds_a_step": round(
                        frames.sum() / features.FRAME_RATE / len(held), 1
                    ),
                    "longest_step_seconds": round(float(held.max()), 1),
                    "longest_over_mean": round(float(held.max() / held.mean()), 3),
                }
            )
    hours = float(frames.sum() / features.FRAME_RATE / 3600)
    described = {
        "utterances": len(utterances),
        "hours": hours,
        "tokenizer": Path(_TOKENIZER.value).name,
    }
    return {"batch_size": batch_size, **described, "rows": rows}


# ---- memory --------------------------------------------------------------------------------------


def measure_memory(utterances, batch_size: int = 4) -> dict:
    """Resident memory of the process while it reads batches, in MiB, twenty times over the run."""
    pipeline.MEMORY_BYTES = 0
    batches = pipeline.train_batches(
        utterances,
        Bytes(),
        data_config(),
        batch_size=batch_size,
        seed=0,
        num_steps=_NUM_BATCHES.value,
    )
    process, curve = psutil.Process(), {}
    every = max(1, _NUM_BATCHES.value // 20)
    for step, _ in enumerate(batches, start=1):
        if step % every == 0:
            curve[step] = round(process.memory_info().rss / 2**20, 1)
    settled = list(curve.values())[1:]  # buffers and readers fill up at first
    return {
        "batches": _NUM_BATCHES.value,
        "batch_size": batch_size,
        "rss_mib": curve,
        "growth_after_the_first_tenth": round(settled[-1] / settled[0] - 1, 4),
        "spread_after_the_first_tenth": round(max(settled) / min(settled) - 1, 4),
    }


def main(argv):
    del argv
    parts = set(_PARTS.value)
    if parts - {"startup"} and not _MANIFEST.value:
        raise app.UsageError("--manifest=MANIFEST,...: what to measure with")
    utterances = [u for path in _MANIFEST.value for u in sources.read_manifest(path)]
    out = Path(_OUT.value)
    results = json.loads(out.read_text()) if out.exists() else {}
    results["machine"] = describe_machine("grain", "soundfile", "torch")
    with tempfile.TemporaryDirectory() as folder:
        if "padding" in parts:
            results["padding"] = measure_padding(utterances)
        if "durations" in parts:
            results["durations"] = measure_durations(utterances)
        if parts & {"speed", "memory"}:
            some = utterances[:: max(1, len(utterances) // _LIMIT.value)]
            variants = copies(some, Path(folder))
        if "speed" in parts:
            results["speed"] = measure_speed(variants)
        if "memory" in parts:
            results["memory"] = measure_memory(variants["array_record"])
        if "startup" in parts:
            results["startup"] = startup.measure(Path(folder), _UTTERANCES.value)
    print(json.dumps(results, indent=2))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
