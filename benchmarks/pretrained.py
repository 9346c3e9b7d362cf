"""Host memory and time of loading a Hugging Face model over 8 devices.

    python -m benchmarks.pretrained --gigabytes=4 --out=benchmarks/results/pretrained.json

Writes a random bfloat16 LLM, then loads it in a fresh process into shards over 8 CPU devices. There
the devices' memory is host memory too, so what loading itself needs is the peak of the anonymous
memory (resident pages that are no file's) over the start, less the bytes of the weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LAYER_BYTES = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)


def write_model(directory: Path, gigabytes: float) -> None:
    """A Llama of about this size with random finite weights, in files of 1 GiB."""
    import jax
    import ml_dtypes
    import numpy as np

    from otreg_jax.models.llm import LLM, LLMConfig
    from otreg_jax.pretrained import save

    num_layers = max(1, int(gigabytes * 1e9 / LAYER_BYTES))
    model = LLM(
        LLMConfig(
            vocab_size=64_000,
            embed_dim=2048,
            num_layers=num_layers,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            mlp_dim=8192,
        )
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    rng = np.random.default_rng(0)

    def random(leaf):
        # Without the exponent's top bit every pattern is a finite number below 2.
        bits = rng.integers(0, 2**16, leaf.shape, np.uint16) & np.uint16(0xBFFF)
        return bits.view(ml_dtypes.bfloat16)

    save.MAX_FILE_BYTES = 2**30
    save.save_llm(directory, model, jax.tree.map(random, shapes))


def anonymous_bytes() -> int:
    """Resident memory of this process that is not the cache of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(directory: Path) -> dict[str, float]:
    """Loads the model over all devices; sizes in bytes, time in seconds."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType

    from otreg_jax import pretrained, sharding

    mesh = jax.make_mesh((1, 4, 2), sharding.AXES, (AxisType.Auto,) * 3)
    jnp.zeros(()).block_until_ready()
    start, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    _, params = pretrained.load_llm(
        directory,
        dtype="bfloat16",
        shardings=lambda shapes: sharding.tree_shardings({"llm": shapes}, mesh)["llm"],
    )
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    leaves = jax.tree.leaves_with_path(params)
    weights = sum(leaf.nbytes for _, leaf in leaves)
    largest = max(
        leaf.nbytes // (leaf.shape[0] if path[0].key == "layers" else 1) for path, leaf in leaves
    )
    extra = peak - start - weights
    return {
        "weights": weights,
        "largest_tensor": largest,
        "peak_beyond_weights": extra,
        "peak_over_largest": extra / largest,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--dir", help="where to write the model; a temporary directory otherwise")
    parser.add_argument("--out", help="JSON file for the result")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure))))
        return
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        write_model(Path(directory), args.gigabytes)
        command = [sys.executable, "-m", "benchmarks.pretrained", f"--measure={directory}"]
        done = subprocess.run(
            command, env=os.environ | flags, check=True, stdout=subprocess.PIPE, text=True
        )
    result = json.loads(done.stdout)
    print(json.dumps(result, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
