"""Eight CPU devices and a strict JAX for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# The second run of a test, in this process or the next, should not compile again.
cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
if cache:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture
def tmp_workdir(tmp_path):
    """A run directory."""
    return tmp_path / "run"
