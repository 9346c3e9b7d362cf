"""Eight CPU devices, a compilation cache that the second run of a test finds filled, and TPUs to
compile for."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
cache = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from launching import fake  # noqa: E402, F401 # a fixture
from toy_run import metrics_of, tone_config, write_tones  # noqa: E402

from otreg_jax import train  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Tests spend their time compiling. Those marked `shipped` speak of the program that users run: in a
# job of its own (launch/test.sh) XLA optimises as it does for them.
jax.config.update("jax_disable_most_optimizations", "OTREG_TEST_SHIPPED" not in os.environ)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """Twelve utterances: each word is a tone. Who changes a file puts it back."""
    return write_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="session")
def finished(manifest, tmp_path_factory):
    """The work directory of a run on them that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished")
    train.train(tone_config(manifest), workdir)
    return workdir


@pytest.fixture(scope="session")
def uninterrupted(finished):
    """Its metrics, by step."""
    return metrics_of(finished)


@pytest.fixture(scope="session")
def tpu_devices():
    """Four chips of a v5p slice that is not there: libtpu compiles for them on any machine."""
    pytest.importorskip("libtpu", reason="libtpu is not installed (pip install jax[tpu])")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_LOG_DIR": "disabled",
        }.items():
            patch.setenv(name, value)
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    return topology.devices
