"""What computes attention best on this device: the kernels of `otreg_jax.models.attention` in turn.

    python -m benchmarks.attention

Whisper base's encoder, forward, and SmolLM2-135M with its gradient, one layer of 16 utterances that
fill half of the longest one to all of it. Kernels that do not run here are left out. Prints
milliseconds, the fastest of --repeats, temporary memory and both as multiples of xla's, and writes
benchmarks/results/attention.json.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import describe_machine
from otreg_jax.models import attention

ROWS, HEAD_DIM = 16, 64
# name: (positions, heads, heads of keys, whether it is causal and the gradient is wanted)
SIZES = {
    "encoder, 30 s": (1500, 8, 8, False),
    "encoder, 20 s": (1000, 8, 8, False),
    "encoder, 8 s": (400, 8, 8, False),
    "encoder, 3 s": (150, 8, 8, False),
    "LLM, 400 positions": (400, 9, 3, True),
    "LLM, 250 positions": (250, 9, 3, True),
    "LLM, 120 positions": (120, 9, 3, True),
}


def kernels(dtype: str) -> list[str]:
    """Those that run here: xla first."""
    found = []
    for name in ("xla", *attention.KERNELS):
        try:
            chosen = attention.choose_kernel(name, None, dtype=dtype, head_dim=HEAD_DIM)
        except ValueError:
            continue
        found += [chosen] if chosen not in found else []
    return found


def measure(kernel: str, size: tuple, dtype: str, repeats: int) -> dict:
    """Milliseconds and temporary MiB of one layer's attention."""
    length, heads, key_heads, is_causal = size
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(ROWS, length, count, HEAD_DIM)), dtype)
        for count in (heads, key_heads, key_heads)
    )
    length_B = jnp.asarray(rng.integers(length // 2, length + 1, ROWS), jnp.int32)
    valid_BL11 = attention.length_mask(length_B, length)[..., None, None]
    options = dict(scale=HEAD_DIM**-0.5, is_causal=is_causal, length_B=length_B, kernel=kernel)
    attend = functools.partial(attention.attention, **options)
    fn = attend
    if is_causal:
        loss = lambda q, k, v: jnp.sum(jnp.where(valid_BL11, attend(q, k, v), 0).astype("float32"))
        fn = jax.grad(loss, argnums=(0, 1, 2))
    program = jax.jit(fn).lower(q, k, v).compile()
    jax.block_until_ready(program(q, k, v))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(q, k, v))
        times.append(1e3 * (time.perf_counter() - began))
    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    return {"milliseconds": min(times), "temporary_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention.json"))
    args = parser.parse_args()
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    sizes = {}
    print(f"{dtype}\n{'':22}{'kernel':10}{'ms':>9}{'MiB':>9}{'times xla':>11}{'its MiB':>9}")
    for name, size in SIZES.items():
        sizes[name] = {x: measure(x, size, dtype, args.repeats) for x in kernels(dtype)}
        xla = sizes[name]["xla"]
        for kernel, found in sizes[name].items():
            ms, mib = found["milliseconds"], found["temporary_mib"]
            times, its = ms / xla["milliseconds"], mib / xla["temporary_mib"]
            print(f"{name:22}{kernel:10}{ms:9.2f}{mib:9.1f}{times:11.2f}{its:9.2f}", flush=True)
    result = {**describe_machine(), "dtype": dtype, "rows": ROWS, "sizes": sizes}
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
