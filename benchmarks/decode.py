"""Decoding side by side: batched, one at a time, and transformers' generate, same weights.

    python -m benchmarks.decode
    python -m benchmarks.decode --size=tiny --batch_size=32
    taskset -c 0 python -m benchmarks.decode --clock=cpu    # on a machine with other work to do

Needs the `dev` extra (torch, transformers). Random Qwen2 models decode the same prompts of mixed
lengths greedily to the same number of tokens, in float32, with as many threads on both sides. All
are timed in turn, round by round, after a warm-up that compiles; ratios are medians of the rounds'
own ratios, so that other load on the machine hits all of them. Prints a table and writes
benchmarks/results/decode.json.
"""

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

from benchmarks.common import describe_machine
from otreg_jax import decoding, pretrained

_SIZES = flags.DEFINE_multi_enum("size", ["tiny", "500m"], ["tiny", "500m"], "Models.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Utterances decoded at once.")
_TOKENS = flags.DEFINE_integer("tokens", 32, "Tokens of every hypothesis.")
_ALONE = flags.DEFINE_integer("alone", 4, "Utterances of the one-at-a-time timings.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Rounds of timing.")
_CLOCK = flags.DEFINE_enum(
    "clock", "wall", ["wall", "cpu"], "Wall-clock time, or CPU time of all threads."
)
_OUT = flags.DEFINE_string("out", "benchmarks/results/decode.json", "File of the results.")

SHAPES = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
    # The shape of Qwen2.5-0.5B: 494 M parameters.
    "500m": dict(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
}
PROMPT = (24, 48)  # fewest and most positions of a prompt: 2 to 4 s of speech at 12.5 a second


def make_models(size: str):
    """The same random weights as a transformers model and as (LLM, params)."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SHAPES[size], tie_word_embeddings=True)
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        llm, params = pretrained.load_llm(folder)
    return theirs, llm, jax.device_put(params)


def make_prompts(count: int, width: int):
    """Right-padded prompt embeddings [B, P, D] and their lengths [B]."""
    rng = np.random.default_rng(0)
    length_B = rng.integers(PROMPT[0], PROMPT[1] + 1, count).astype(np.int32)
    x_BPD = rng.normal(size=(count, PROMPT[1], width)).astype(np.float32)
    return x_BPD * (np.arange(PROMPT[1]) < length_B[:, None])[..., None], length_B


def ours(llm, params, x_BPD, length_B, num_tokens: int) -> np.ndarray:
    # No token ends a hypothesis: every run does the same work.
    settings = decoding.Settings(num_tokens)
    return np.asarray(decoding.greedy(llm, params, x_BPD, length_B, -1, settings).tokens)


def transformers_generate(model, x_BPD, length_B, num_tokens: int) -> np.ndarray:
    """Greedy `generate` on a left-padded batch, which is how it takes mixed lengths."""
    size = int(length_B.max())
    left_BPD = np.zeros((len(length_B), size, x_BPD.shape[-1]), np.float32)
    mask_BP = np.zeros((len(length_B), size), np.int64)
    for b, length in enumerate(length_B):
        left_BPD[b, size - length :] = x_BPD[b, :length]
        mask_BP[b, size - length :] = 1
    with torch.inference_mode():
        out = model.generate(
            inputs_embeds=torch.from_numpy(left_BPD),
            attention_mask=torch.from_numpy(mask_BP),
            do_sample=False,
            num_beams=1,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out.numpy()


def measure(size: str) -> dict:
    """Utterances a second of each way, by round, and how many hypotheses agree."""
    theirs, llm, params = make_models(size)
    x_BPD, length_B = make_prompts(_BATCH_SIZE.value, llm.config.embed_dim)
    tokens, alone = _TOKENS.value, _ALONE.value
    one_by_one = [slice(b, b + 1) for b in range(alone)]
    ways = {
        "otreg_jax, batched": (len(x_BPD), lambda: ours(llm, params, x_BPD, length_B, tokens)),
        "otreg_jax, one at a time": (
            alone,
            lambda: np.concatenate(
                [ours(llm, params, x_BPD[b], length_B[b], tokens) for b in one_by_one]
            ),
        ),
        "transformers, batched": (
            len(x_BPD),
            lambda: transformers_generate(theirs, x_BPD, length_B, tokens),
        ),
        "transformers, one at a time": (
            alone,
            lambda: np.concatenate(
                [transformers_generate(theirs, x_BPD[b], length_B[b], tokens) for b in one_by_one]
            ),
        ),
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
    print(f"{'':30} {'utterances/s':>12} {'batched is':>12}   same tokens")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(ours_rates, values, strict=True))
        print(
            f"{name:30} {statistics.median(values):12.2f} {ratio:10.2f} x   "
            f"{result['same_tokens_as_batched'][name]}"
        )


def main(argv):
    del argv
    transformers.logging.set_verbosity_error()
    machine = describe_machine("torch", "transformers")
    torch.set_num_threads(machine["cores"])
    results = {
        **machine,
        "clock": _CLOCK.value,
        "batch_size": _BATCH_SIZE.value,
        "tokens": _TOKENS.value,
        "models": {},
    }
    for size in _SIZES.value:
        results["models"][size] = measure(size)
        print_table(size, results["models"][size])
    Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
    Path(_OUT.value).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
