"""A whole epoch, start-up included: ours beside a PyTorch loop as people write it.

    python -m benchmarks.epoch --encoder=whisper-base --llm=smollm2-135m \\
        --manifest=read-train.jsonl,talk-train.jsonl
    python -m benchmarks.epoch --made_up=512     # random weights of these shapes, random recordings
    python -m benchmarks.epoch --made_up=8 --encoder=whisper-nano --llm=qwen2-nano --batch_size=4

Both train the same parts on the same recordings for one epoch: a frozen Whisper encoder, a
projector over four stacked positions, a frozen LLM with LoRA (rank 16 on q, k, v, o),
cross-entropy, AdamW, as many utterances a step, float32 on a CPU and bfloat16 on a GPU. Ours is
`python -m otreg_jax.train` with packing. The peer is transformers and PEFT: batches grouped by
length and padded to their longest (the encoder too, whose positions are cut; it would insist on
30 s), loaded by worker processes, with and without torch.compile of encoder and LLM (dynamic
shapes). Each is a process of its own: its whole time, imports included, the time after its first
step, and its peak memory are measured, --repeats times in turn. Each way begins with an empty cache
of compiled programs; "ours, compiled before" is a second run that finds it filled. Then the parts
of a step are timed: the peer's in its epoch, ours one after the other on the first batches of the
run. Prints two tables and writes benchmarks/results/epoch.json. Needs the `bench` extra.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from absl import app, flags

from benchmarks.common import SHAPES, describe_machine, whisper_shape
from otreg_jax.data import audio, manifest, tokenization

_MANIFEST = flags.DEFINE_list("manifest", [], "Corpus.")
_ENCODER = flags.DEFINE_string("encoder", "whisper-base", "A directory; a shape with --made_up.")
_LLM = flags.DEFINE_string("llm", "smollm2-135m", "A directory; a shape with --made_up.")
_MADE_UP = flags.DEFINE_integer("made_up", 0, "So many random recordings, and random weights.")
_MAX_UTTERANCES = flags.DEFINE_integer("max_utterances", 0, "Only the first so many; 0: all.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Utterances a step.")
_COMPILE = flags.DEFINE_bool("compile", True, "Also the peer under torch.compile.")
_REPEATS = flags.DEFINE_integer("repeats", 1, "Epochs of each.")
_OUT = flags.DEFINE_string("out", "benchmarks/results/epoch.json", "File of the results.")
_PEER = flags.DEFINE_string("peer", "", "Be the peer, as this JSON says.")
_PARTS_OF = flags.DEFINE_string("parts_of", "", "Time the parts of the steps of this run of ours.")

STACK, HIDDEN, RANK, LEARNING_RATE = 4, 1024, 16, 1e-4
BUCKETS = 4  # of ours: with packing few are enough, and each is compiled
TIMED = 8  # batches whose parts are timed
PARTS = "encoder and projector", "LLM, forward", "backward and update"
MEGABATCH = 50  # batches that are sorted by length among themselves
WORDS = "we met to read what the others wrote about rain and slow trains".split()


# ---- the peer ------------------------------------------------------------------------------------


def be_the_peer(job: dict) -> None:
    """Trains one epoch and prints when its first and its last step were done."""
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    encoder = transformers.WhisperModel.from_pretrained(job["encoder"], dtype=dtype).encoder
    encoder = encoder.to(device).eval().requires_grad_(False)
    llm = transformers.AutoModelForCausalLM.from_pretrained(job["llm"], dtype=dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    llm = peft.get_peft_model(llm, lora).to(device)
    projector = torch.nn.Sequential(
        torch.nn.Linear(STACK * encoder.config.d_model, HIDDEN),
        torch.nn.GELU(),
        torch.nn.Linear(HIDDEN, llm.config.hidden_size),
    ).to(device)
    tokenizer = tokenization.load_tokenizer(job["tokenizer"])
    extract = transformers.WhisperFeatureExtractor(encoder.config.num_mel_bins)
    utterances = [u for path in job["manifests"] for u in manifest.read_manifest(path)]
    utterances = utterances[: job["max_utterances"] or None]

    class Recordings(torch.utils.data.Dataset):
        def __len__(self):
            return len(utterances)

        def __getitem__(self, i):
            ids = [*tokenizer.encode(utterances[i].text), tokenizer.eos_id]
            return audio.load_audio(utterances[i]), torch.tensor(ids)

    def collate(examples):
        audio, ids = zip(*examples, strict=True)
        options = dict(sampling_rate=16000, padding="longest", return_tensors="pt")
        mel = extract(list(audio), **options).input_features
        stride = 2 * STACK * extract.hop_length
        lengths = [max(len(a) // stride, 1) for a in audio]
        whole = -(-mel.shape[2] // (2 * STACK)) * 2 * STACK
        return torch.nn.functional.pad(mel, (0, whole - mel.shape[2])), lengths, ids

    def encode(mel):
        gelu = torch.nn.functional.gelu
        x = gelu(encoder.conv2(gelu(encoder.conv1(mel)))).transpose(1, 2)
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        for layer in encoder.layers:
            out = layer(x, None)
            x = out[0] if isinstance(out, tuple) else out
        return encoder.layer_norm(x)

    laps = []  # of each step: when it began, and when each of PARTS was done

    def lap():
        if device == "cuda":
            torch.cuda.synchronize()
        laps[-1].append(time.perf_counter())

    if job["compile"]:
        encode = torch.compile(encode, dynamic=True)
        llm.forward = torch.compile(llm.forward, dynamic=True)

    def loss_of(mel, lengths, ids):
        with torch.no_grad():
            encoded = encode(mel.to(device, dtype))
        B, S, E = encoded.shape
        speech = projector(encoded.reshape(B, S // STACK, STACK * E).float()).to(dtype)
        lap()
        embed = llm.get_input_embeddings()
        ids = [x.to(device) for x in ids]
        rows = [
            torch.cat([speech[b, :n], embed(x)])
            for b, (n, x) in enumerate(zip(lengths, ids, strict=True))
        ]
        unheard = [torch.full((n,), -100, device=device) for n in lengths]
        labels = [torch.cat([no, x]) for no, x in zip(unheard, ids, strict=True)]
        pad = torch.nn.utils.rnn.pad_sequence
        sizes = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(max(sizes), device=device) < sizes[:, None]
        labels = pad(labels, batch_first=True, padding_value=-100)
        return llm(
            inputs_embeds=pad(rows, batch_first=True), attention_mask=mask.long(), labels=labels
        ).loss

    batch_size = job["batch_size"]
    order = np.random.default_rng(0).permutation(len(utterances))
    grouped = []  # as transformers' group_by_length does
    for start in range(0, len(order), MEGABATCH * batch_size):
        some = order[start : start + MEGABATCH * batch_size]
        grouped += sorted(some.tolist(), key=lambda i: -utterances[i].duration)
    batches = [grouped[i : i + batch_size] for i in range(0, len(grouped), batch_size)]
    workers = dict(num_workers=1 if device == "cpu" else 8, prefetch_factor=4)
    loader = torch.utils.data.DataLoader(
        Recordings(), batch_sampler=batches, collate_fn=collate, **workers
    )
    trained = [p for p in [*llm.parameters(), *projector.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    first, losses = None, []
    for batch in loader:
        laps.append([time.perf_counter()])
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(*batch)
        lap()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        lap()
        losses.append(loss.detach())
        if first is None:
            first = (float(loss.detach()), time.time())
    last = (float(torch.stack(losses)[-1]), time.time())
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    said = {"losses": [first[0], last[0]], "first": first[1], "last": last[1], "device": memory}
    # Without the first batch, which may compile, unless there is no other.
    timed, count = (laps[1:], len(utterances) - batch_size) if laps[1:] else (laps, len(utterances))
    parts = np.diff(timed, axis=1).sum(axis=0) / count
    print(json.dumps(said | {"parts": dict(zip(PARTS, parts.tolist(), strict=True))}))


# ---- ours ----------------------------------------------------------------------------------------


def time_our_parts(folder: str) -> None:
    """Prints the seconds an utterance of each of PARTS, as differences of programs that do more
    and more, each run once before."""
    import jax

    from otreg_jax import build, losses, optim, rundir, sharding, train
    from otreg_jax.models import slm as slm_lib

    run, files = build.load_run(folder), rundir.of(folder)
    data = train.load_data(run.config, files)
    trained, frozen = build.split(run.params, run.config)
    batches = train.train_batches(run.config, data, files, (0, 1), 0, None, run.slm, frozen)
    schedules = losses.make_schedules(run.config)

    def loss_of(trained, frozen, batch):
        params = optim.merge(trained, frozen)
        return losses.loss_fn(run.slm, params, batch, 0, config=run.config, schedules=schedules)[0]

    def heard(trained, frozen, batch):
        mel, segments = (batch["mel"], batch["mel_length"]), batch.get("encoder_segments")
        params = optim.merge(trained, frozen)
        return slm_lib.speech_embeddings(run.slm, params, *mel, None, segments)[0]

    seconds, count = np.zeros(3), 0
    for batch, _ in zip(batches, range(TIMED), strict=False):
        count += len(batch["index"])
        placed = sharding.to_global(batch, run.mesh)
        for i, fn in enumerate(map(jax.jit, (heard, loss_of, jax.grad(loss_of)))):
            jax.block_until_ready(fn(trained, frozen, placed))
            began = time.perf_counter()
            jax.block_until_ready(fn(trained, frozen, placed))
            seconds[i] += time.perf_counter() - began
    parts = np.diff(seconds, prepend=0) / count
    print(json.dumps(dict(zip(PARTS, parts.tolist(), strict=True))))


# ---- both ----------------------------------------------------------------------------------------


def run(command: list[str], **environment) -> tuple[str, float, float, float]:
    """(what it prints, when it began and ended, peak memory in MiB) of a process.

    Raises:
      SystemExit: it failed.
    """
    with tempfile.TemporaryFile("w+") as said:
        began = time.time()
        process = subprocess.Popen(command, stdout=said, env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.time()
        said.seek(0)
        text = said.read()
    if status:
        sys.exit(f"{' '.join(command[:4])} ... failed:\n{text[-2000:]}")
    return text, began, ended, usage.ru_maxrss / 1024


def result(count: int, began, first, last, ended, peak, losses) -> dict:
    after = count - _BATCH_SIZE.value
    return {
        "seconds": ended - began,
        "to_the_first_step": first - began,
        "utterances_per_sec": count / (ended - began),
        "after_the_first_step": after / (last - first) if after > 0 else None,
        "peak_mib": peak,
        "losses": losses,
    }


def run_ours(job: dict, count: int, folder: Path) -> dict:
    settings = {
        "encoder.path": job["encoder"],
        "llm.path": job["llm"],
        "tokenizer.path": job["tokenizer"],
        "data.train": ",".join(job["manifests"]),
        "data.max_utterances": job["max_utterances"],
        "data.num_mels": job["num_mels"],
        "batch_size": _BATCH_SIZE.value,
        "num_steps": -(-count // _BATCH_SIZE.value),
        "checkpoint_every": 10**6,
        "log_every": 1,
        "encoder.keep": False,
        "packing": True,
        "data.num_buckets": BUCKETS,
        "compute_dtype": job["dtype"],
        "prompt": "{speech}",
        "optim.warmup_steps": 0,
        "optim.learning_rate": LEARNING_RATE,
        "adapter.norm": "none",
    }
    command = [sys.executable, "-m", "otreg_jax.train", "--config=configs/laptop.py:ce"]
    command += [f"--workdir={folder}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    _, began, ended, peak = run(command, JAX_COMPILATION_CACHE_DIR=str(folder.parent / "compiled"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [lines[0]["ce"], lines[-1]["ce"]]
    return result(count, began, lines[0]["time"], lines[-1]["time"], ended, peak, losses)


def run_peer(job: dict, count: int, is_compiled: bool) -> dict:
    said = json.dumps(job | {"compile": is_compiled})
    command = [sys.executable, "-m", "benchmarks.epoch", f"--peer={said}"]
    with tempfile.TemporaryDirectory() as cache:
        text, began, ended, peak = run(command, TORCHINDUCTOR_CACHE_DIR=cache)
    found = json.loads(text.splitlines()[-1])
    steps = found["first"], found["last"]
    more = {key: found[key] for key in ("device", "parts")}
    return result(count, began, *steps, ended, peak, found["losses"]) | more


def make_up(folder: Path, count: int) -> dict:
    """Recordings of noise of 1 to 15 s, a tokenizer, and models of random weights."""
    import transformers

    shape = transformers.WhisperConfig(**whisper_shape(_ENCODER.value))
    transformers.WhisperModel(shape).save_pretrained(folder / "enc")
    config = transformers.AutoConfig.from_pretrained(SHAPES / _LLM.value)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llm")
    rng, lines = np.random.default_rng(0), []
    for i in range(count):
        samples = int(16000 * 15 ** rng.uniform())
        soundfile.write(folder / f"{i}.flac", 0.1 * rng.standard_normal(samples).clip(-3, 3), 16000)
        text = " ".join(rng.choice(WORDS, size=2 + samples // 6000))
        line = {"audio_filepath": f"{i}.flac", "text": text, "duration": samples / 16000}
        lines.append(json.dumps(line) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    texts = [json.loads(line)["text"] for line in lines]
    tokenization.train_sentencepiece(texts, folder / "words", 64, model_type="word")
    parts = {"encoder": "enc", "llm": "llm", "tokenizer": "words.model"}
    found = {name: str(folder / path) for name, path in parts.items()}
    return found | {"manifests": [str(folder / "train.jsonl")]}


def main(argv):
    del argv
    if _PEER.value:
        return be_the_peer(json.loads(_PEER.value))
    if _PARTS_OF.value:
        return time_our_parts(_PARTS_OF.value)
    machine = describe_machine("flax", "torch", "transformers", "peft")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        job = {"encoder": _ENCODER.value, "llm": _LLM.value, "tokenizer": _LLM.value}
        job["manifests"] = [os.path.abspath(path) for path in _MANIFEST.value]
        if _MADE_UP.value:
            job = make_up(folder, _MADE_UP.value)
        count = sum(len(manifest.read_manifest(path)) for path in job["manifests"])
        count = min(count, _MAX_UTTERANCES.value or count)
        mels = json.loads((Path(job["encoder"]) / "config.json").read_text())["num_mel_bins"]
        job |= {"max_utterances": _MAX_UTTERANCES.value, "batch_size": _BATCH_SIZE.value}
        job |= {"num_mels": mels, "dtype": "float32" if machine["device"] == "cpu" else "bfloat16"}
        # Of each repetition with programs of its own.
        ways = {
            "ours": lambda i: run_ours(job, count, folder / f"{i}" / "first"),
            "ours, compiled before": lambda i: run_ours(job, count, folder / f"{i}" / "second"),
        }
        ways["torch"] = lambda _: run_peer(job, count, False)
        if _COMPILE.value:
            ways["torch.compile"] = lambda _: run_peer(job, count, True)
        runs = {name: [] for name in ways}
        for i in range(_REPEATS.value):
            for name, way in ways.items():
                runs[name].append(way(i))
                print(name, runs[name][-1], file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.epoch", f"--parts_of={folder}/0/second"]
        runs["ours"][0]["parts"] = json.loads(run(command)[0].splitlines()[-1])
    print(
        f"{count} utterances\n{'':22}{'s':>8}{'1st step s':>12}{'utt/s':>8}{'after':>8}{'MiB':>8}"
    )
    for name, found in runs.items():
        middle = lambda key, found=found: statistics.median(run[key] or 0 for run in found)
        print(
            f"{name:22}{middle('seconds'):8.1f}{middle('to_the_first_step'):12.1f}"
            f"{middle('utterances_per_sec'):8.2f}{middle('after_the_first_step'):8.2f}"
            f"{middle('peak_mib'):8.0f}   ours is faster by "
            f"{middle('seconds') / statistics.median(r['seconds'] for r in runs['ours']):.2f}"
        )
    print(f"{'ms an utterance':22}" + "".join(f"{part:>24}" for part in PARTS))
    for name, found in runs.items():
        if parts := found[0].get("parts"):
            print(f"{name:22}" + "".join(f"{1e3 * parts[part]:24.1f}" for part in PARTS))
    settings = {"batch_size": _BATCH_SIZE.value, "utterances": count}
    names = {"encoder": Path(_ENCODER.value).name, "llm": Path(_LLM.value).name}
    settings |= names | {"made_up": bool(_MADE_UP.value)}
    Path(_OUT.value).write_text(json.dumps({**machine, **settings, "runs": runs}, indent=2) + "\n")
    return None


if __name__ == "__main__":
    app.run(main)
