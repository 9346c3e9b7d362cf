"""Decoding side by side: batched, one at a time, and transformers' generate, same weights.

    python -m benchmarks.decode
    python -m benchmarks.decode --size=tiny --batch_size=32
    taskset -c 0 python -m benchmarks.decode --clock=cpu    # on a machine with other work to do

Needs the `dev` extra (torch, transformers). Random models decode the same prompts of mixed lengths
greedily to the same number of tokens, in float32 on a CPU with as many threads on both sides, in
bfloat16 on a GPU; generate also with a static cache. All are timed in turn, round by round, after a
warm-up that compiles; ratios are medians of the rounds' own ratios, so that other load on the
machine hits all of them. Prints a table and writes benchmarks/results/decode.json.
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

from benchmarks.common import SHAPES, describe_machine
from otreg_jax import decoding, pretrained

SIZES = {"tiny": "qwen2-nano", "135m": "smollm2-135m", "500m": "qwen2.5-0.5b"}
_SIZES = flags.DEFINE_multi_enum("size", list(SIZES), list(SIZES), "Models.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Utterances decoded at once.")
_TOKENS = flags.DEFINE_integer("tokens", 32, "Tokens of every hypothesis.")
_ALONE = flags.DEFINE_integer("alone", 4, "Utterances of the one-at-a-time timings.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds of timing.")
_CLOCK = flags.DEFINE_enum(
    "clock", "wall", ["wall", "cpu"], "Wall-clock time, or CPU time of all threads."
)
_OUT = flags.DEFINE_string("out", "benchmarks/results/decode.json", "File of the results.")

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
    theirs, llm, params = make_models(size, device)
    step_params = decoding.prepare_steps(llm, params)
    x_BPD, length_B = make_prompts(_BATCH_SIZE.value, llm.config.embed_dim)
    tokens, alone = _TOKENS.value, _ALONE.value
    we = functools.partial(ours, llm, params, step_params, num_tokens=tokens)
    they = functools.partial(generate, theirs, num_tokens=tokens)
    static = functools.partial(they, cache_implementation="static", disable_compile=True)

    def one_by_one(decode):
        return np.concatenate([decode(x_BPD[b : b + 1], length_B[b : b + 1]) for b in range(alone)])

    ways = {
        "otreg_jax, batched": (len(x_BPD), lambda: we(x_BPD, length_B)),
        "otreg_jax, one at a time": (alone, lambda: one_by_one(we)),
        "transformers, batched": (len(x_BPD), lambda: they(x_BPD, length_B)),
        "transformers, batched, static cache": (len(x_BPD), lambda: static(x_BPD, length_B)),
        "transformers, one at a time": (alone, lambda: one_by_one(they)),
    }
    hypotheses = {name: decode() for name, (_, decode) in ways.items()}
    first = hypotheses["otreg_jax, batched"]
    agree = {
        name: f"{(found == first[: len(found)]).all(axis=1).sum()} of {len(found)}"
        for name, found in hypotheses.items()
    }
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[_CLOCK.value]
    rates = {name: [] for name in ways}
    for _ in range(_REPEATS.value):
        for name, (count, decode) in ways.items():
            start = clock()
            decode()
            rates[name].append(count / (clock() - start))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"parameters": parameters, "utterances_per_sec": rates, "same_tokens_as_batched": agree}


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
