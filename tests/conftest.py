"""Eight CPU devices, and a compilation cache that the second run of a test finds filled."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
cache = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # tests spend their time compiling
