"""Decoding side by side: batched, one at a time, and transformers' generate, same weights.

    python -m benchmarks.decode
    python -m benchmarks.decode --size=tiny --batch_size=32
    python -m benchmarks.decode --size=recognizer    # Whisper base, projector, SmolLM2-135M
    taskset -c 0 python -m benchmarks.decode --clock=cpu    # on a machine with other work to do

Needs the `dev` extra (torch, transformers). Random models decode the same prompts of mixed lengths
greedily to the same number of tokens, in float32 on a CPU with as many threads on both sides, in
bfloat16 on a GPU; generate also with a static cache. `recognizer` begins with log-mel frames,
SECONDS of them in every utterance, as transformers' encoder knows no padding; it has its positions
cut to that, and is timed as published too, where it insists on 30 s. All are timed in turn, round
by round, after a warm-up that compiles; ratios are medians of the rounds' own ratios, so that other
load on the machine hits all of them. Prints a table and writes benchmarks/results/decode.json.
"""

import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from absl import app, flags

from benchmarks.common import SHAPES, describe_machine, whisper_shape
from otreg_jax import build, decoding, pretrained, sharding
from otreg_jax import config as config_lib
from otreg_jax.data import text
from otreg_jax.models import slm as slm_lib

SIZES = {
    "tiny": "qwen2-nano",
    "135m": "smollm2-135m",
    "500m": "qwen2.5-0.5b",
    "recognizer": "smollm2-135m",
}
ENCODER, STACK, HIDDEN, SECONDS = "whisper-base", 4, 1024, 4.0
_SIZES = flags.DEFINE_multi_enum("size", list(SIZES), list(SIZES), "Models.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Utterances decoded at once.")
_TOKENS = flags.DEFINE_integer("tokens", 32, "Tokens of every hypothesis.")
_ALONE = flags.DEFINE_integer("alone", 4, "Utterances of the one-at-a-time timings.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds of timing.")
_CLOCK = flags.DEFINE_enum(
    "clock", "wall", ["wall", "cpu"], "Wall-clock time, or CPU time of all threads."
)
_OUT = flags.DEFINE_string("out", "benchmarks/results/decode.json", "File of the results.")

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STATIC = {"cache_implementation": "static", "disable_compile": True}  # of `generate`
PROMPT = (24, 48)  # fewest and most positions of a prompt: 2 to 4 s of speech at 12.5 a second


def make_models(size: str, device: str):
    """The same random weights as a transformers model and as (LLM, params for `greedy`)."""
    torch.manual_seed(0)
    dtype = "bfloat16" if device == "cuda" else "float32"
    config = transformers.AutoConfig.from_pretrained(SHAPES / SIZES[size])
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        llm, params = pretrained.load_llm(folder, dtype=dtype)
    return theirs.to(device, getattr(torch, dtype)), llm, jax.device_put(params)


def make_prompts(count: int, width: int):
    """Right-padded prompt embeddings [B, P, D] and their lengths [B]."""
    rng = np.random.default_rng(0)
    length_B = rng.integers(PROMPT[0], PROMPT[1] + 1, count).astype(np.int32)
    x_BPD = rng.normal(size=(count, PROMPT[1], width)).astype(np.float32)
    return x_BPD * (np.arange(PROMPT[1]) < length_B[:, None])[..., None], length_B


def ours(llm, params, step_params, x_BPD, length_B, num_tokens: int) -> np.ndarray:
    # No token ends a hypothesis: every run does the same work.
    settings = decoding.Settings(num_tokens)
    decoded = decoding.greedy(llm, params, x_BPD, length_B, -1, settings, step_params=step_params)
    return np.asarray(decoded.tokens)


def generate(model, x_BPD, length_B, num_tokens: int, **options) -> np.ndarray:
    """transformers' greedy `generate` on a left-padded batch, which is how it takes mixed lengths.

    options: of `generate`.
    """
    size = int(length_B.max())
    left_BPD = np.zeros((len(length_B), size, x_BPD.shape[-1]), np.float32)
    mask_BP = np.zeros((len(length_B), size), np.int64)
    for b, length in enumerate(length_B):
        left_BPD[b, size - length :] = x_BPD[b, :length]
        mask_BP[b, size - length :] = 1
    with torch.inference_mode():
        out = model.generate(
            inputs_embeds=torch.from_numpy(left_BPD).to(model.device, model.dtype),
            attention_mask=torch.from_numpy(mask_BP).to(model.device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
    return out.cpu().numpy()


def measure(size: str, device: str) -> dict:
    """Utterances a second of each way, by round, and how many hypotheses agree."""
    if size == "recognizer":
        return measure_recognizer(device)
    theirs, llm, params = make_models(size, device)
    step_params = decoding.prepare_steps(llm, params)
    prompts = make_prompts(_BATCH_SIZE.value, llm.config.embed_dim)
    tokens = _TOKENS.value
    we = functools.partial(ours, llm, params, step_params, num_tokens=tokens)
    they = functools.partial(generate, theirs, num_tokens=tokens)
    return race(we, they, prompts) | {"parameters": size_of(params)}


def size_of(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def make_recognizer(device: str):
    """The same random weights as (encoder, projector, LLM) of torch and as (SLM, params)."""
    frames = round(SECONDS * 100) // (2 * STACK) * 2 * STACK
    theirs, llm, llm_params = make_models("recognizer", device)
    shape = whisper_shape(ENCODER, max_source_positions=frames // 2)
    whisper = transformers.WhisperModel(transformers.WhisperConfig(**shape)).eval()
    config = config_lib.default()
    config.compute_dtype = "bfloat16" if device == "cuda" else "float32"
    config.adapter.stack, config.adapter.hidden_dim = STACK, HIDDEN
    with tempfile.TemporaryDirectory() as folder:
        whisper.save_pretrained(folder)
        config.encoder.path, config.llm.path = folder, str(SHAPES / SIZES["recognizer"])
        mesh = sharding.make_mesh(config, jax.devices()[:1])
        # No token ends a hypothesis.
        slm = build.modules(config, 0, text.Prompt((), (4,), -1), config.llm.path, mesh)
        _, encoder_params = pretrained.load_speech_encoder(folder, dtype=config.compute_dtype)
    params = build.init_params(slm, config, {"encoder": encoder_params, "llm": llm_params})
    projector = torch.nn.Sequential(
        torch.nn.Linear(STACK * whisper.config.d_model, HIDDEN),
        torch.nn.GELU(),
        torch.nn.Linear(HIDDEN, theirs.config.hidden_size),
    )
    for name, layer in (("in", projector[0]), ("out", projector[2])):
        kernel, bias = (x.detach().numpy() for x in (layer.weight.T, layer.bias))
        params["adapter"][name] = {"kernel": kernel, "bias": bias}
    params = decoding.for_run(slm, jax.device_put(params))
    encoder = whisper.encoder.to(device, theirs.dtype)
    return encoder, projector.to(device, theirs.dtype), theirs, slm, params, frames


def as_published(encoder, frames: int):
    """The encoder with all positions that it is published with, as a function of `frames`."""
    config = transformers.WhisperConfig(**encoder.config.to_dict() | {"max_source_positions": 1500})
    whole = type(encoder)(config).eval().to(encoder.device, encoder.dtype)
    held = encoder.state_dict()
    del held["embed_positions.weight"]
    whole.load_state_dict(held, strict=False)

    def encode(mel_BMF):
        mel_BMF = torch.nn.functional.pad(mel_BMF, (0, 3000 - frames))
        return whole(mel_BMF).last_hidden_state[:, : frames // 2]

    return encode


def measure_recognizer(device: str) -> dict:
    encoder, projector, theirs, slm, params, frames = make_recognizer(device)
    rng = np.random.default_rng(0)
    shape = _BATCH_SIZE.value, frames, encoder.config.num_mel_bins
    mel_BFM = rng.normal(size=shape).astype(np.float32)
    length_B = np.full(len(mel_BFM), frames, np.int32)
    inputs = mel_BFM, length_B

    def we(mel_BFM, length_B, tokens):
        settings = decoding.Settings(tokens)
        return np.asarray(decoding.recognize(slm, params, mel_BFM, length_B, settings).tokens)

    def heard(mel_BFM, encode):
        mel_BMF = torch.from_numpy(mel_BFM).to(theirs.device, theirs.dtype).transpose(1, 2)
        return encode(mel_BMF)

    def they(mel_BFM, length_B, tokens, encode, **options):
        with torch.inference_mode():
            encoded_BSE = heard(mel_BFM, encode)
            count, positions, width = encoded_BSE.shape
            stacked = encoded_BSE.reshape(count, positions // STACK, STACK * width)
            x_BPD = torch.nn.functional.pad(projector(stacked), (0, 0, 0, 1)).float().cpu().numpy()
            said = theirs.get_input_embeddings()(torch.tensor(slm.prompt.suffix).to(theirs.device))
        x_BPD[np.arange(count), length_B // (2 * STACK)] = said.float().cpu().numpy()
        return generate(theirs, x_BPD, length_B // (2 * STACK) + 1, tokens, **options)

    tokens = _TOKENS.value
    encode_cut = lambda mel_BMF: encoder(mel_BMF).last_hidden_state
    cut = functools.partial(they, encode=encode_cut)
    whole = functools.partial(they, encode=as_published(encoder, frames), tokens=tokens)
    more = {"transformers, batched, encoder over 30 s": (len(mel_BFM), lambda: whole(*inputs))}
    we_all, they_all = (functools.partial(way, tokens=tokens) for way in (we, cut))
    parts = {name: params[name] for name in ("encoder", "adapter", "llm")}
    result = race(we_all, they_all, inputs, more) | {"parameters": size_of(parts)}
    encode = jax.jit(lambda params, *x: slm_lib.speech_embeddings(slm, params, *x)[0])
    ways = {
        "otreg_jax, encoder": lambda: encode(params, *inputs).block_until_ready(),
        "otreg_jax, to the first token": lambda: we(*inputs, 1),
        "transformers, encoder": lambda: heard(mel_BFM, encode_cut).cpu(),
        "transformers, to the first token": lambda: cut(*inputs, 1, **STATIC),
    }
    return result | {"seconds": {name: timed(way) for name, way in ways.items()}}


def timed(way) -> float:
    """The median of --repeats calls after the first, seconds."""
    with torch.inference_mode():
        way()
        clock, taken = CLOCKS[_CLOCK.value], []
        for _ in range(_REPEATS.value):
            start = clock()
            way()
            taken.append(clock() - start)
    return round(statistics.median(taken), 4)


def race(we, they, inputs, more: dict | None = None) -> dict:
    """Utterances a second of `we` and `they`, functions of inputs [B, ...], and of `more`, {name:
    (utterances, function)}, by round."""
    count, alone = len(inputs[0]), min(_ALONE.value, len(inputs[0]))
    static = functools.partial(they, **STATIC)

    def one_by_one(decode):
        return np.concatenate([decode(*(x[b : b + 1] for x in inputs)) for b in range(alone)])

    ways = {
        "otreg_jax, batched": (count, lambda: we(*inputs)),
        "otreg_jax, one at a time": (alone, lambda: one_by_one(we)),
        "transformers, batched": (count, lambda: they(*inputs)),
        "transformers, batched, static cache": (count, lambda: static(*inputs)),
        "transformers, one at a time": (alone, lambda: one_by_one(they)),
        **(more or {}),
    }
    hypotheses = {name: decode() for name, (_, decode) in ways.items()}
    first = hypotheses["otreg_jax, batched"]
    agree = {
        name: f"{(found == first[: len(found)]).all(axis=1).sum()} of {len(found)}"
        for name, found in hypotheses.items()
    }
    clock = CLOCKS[_CLOCK.value]
    rates = {name: [] for name in ways}
    for _ in range(_REPEATS.value):
        for name, (rows, decode) in ways.items():
            start = clock()
            decode()
            rates[name].append(rows / (clock() - start))
    return {"utterances_per_sec": rates, "same_tokens_as_batched": agree}


def print_table(size: str, result: dict) -> None:
    rates = result["utterances_per_sec"]
    ours_rates = rates["otreg_jax, batched"]
    print(
        f"\n{size}: {result['parameters'] / 1e6:.1f} M parameters, batch {_BATCH_SIZE.value}, "
        f"{_TOKENS.value} tokens each"
    )
    print(f"{'':36} {'utterances/s':>12} {'batched is':>12}   same tokens")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(ours_rates, values, strict=True))
        print(
            f"{name:36} {statistics.median(values):12.2f} {ratio:10.2f} x   "
            f"{result['same_tokens_as_batched'][name]}"
        )
    for name, seconds in result.get("seconds", {}).items():
        print(f"{name:36} {seconds:12.2f} s a batch")


def main(argv):
    del argv
    transformers.logging.set_verbosity_error()
    machine = describe_machine("torch", "transformers")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.set_num_threads(machine["cores"])
    results = {
        **machine,
        "clock": _CLOCK.value,
        "batch_size": _BATCH_SIZE.value,
        "tokens": _TOKENS.value,
        "models": {},
    }
    for size in _SIZES.value:
        results["models"][size] = measure(size, device)
        print_table(size, results["models"][size])
    Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
    Path(_OUT.value).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
