"""A spoken language model and batches small enough for any test."""

import jax
import jax.numpy as jnp
import numpy as np

from otreg_jax import config as config_lib
from otreg_jax import losses
from otreg_jax.data.text import Prompt
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.adapter import AdapterConfig
from otreg_jax.models.llm import LLMConfig
from otreg_jax.models.speech_encoder import SpeechEncoderConfig

VOCAB = 24


def toy_slm(
    width: int = 16, ctc: bool = False, mesh=None, dtype="float32", remat="none", dropout=0.0
):
    """(SLM, params) with random weights from a fixed seed; the SLM computes on `mesh`."""
    encoder = SpeechEncoderConfig(
        embed_dim=width,
        num_layers=1,
        num_heads=2,
        mlp_dim=2 * width,
        num_mels=8,
        max_positions=64,
        strides=(1, 2),
        dtype=dtype,
        remat=remat,
    )
    adapter = AdapterConfig(
        in_dim=width, out_dim=width, hidden_dim=width, stack=2, dtype=dtype, dropout=dropout
    )
    llm = LLMConfig(
        vocab_size=VOCAB,
        embed_dim=width,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=width // 2,
        mlp_dim=2 * width,
        dtype=dtype,
        remat=remat,
    )
    slm = slm_lib.make(encoder, adapter, llm, Prompt(prefix=(1,), suffix=(3, 4), eos=2), mesh)
    key = jax.random.key(0)

    @jax.jit  # op by op, initialisation compiles hundreds of programs
    def init():
        return {
            "encoder": slm.encoder.init(key, jnp.zeros((1, 8, 8)), jnp.array([8]))["params"],
            "adapter": slm.adapter.init(key, jnp.zeros((1, 4, width)), jnp.array([4]))["params"],
            "llm": slm.llm.init(key, jnp.zeros((1, 2), jnp.int32))["params"],
        }

    params = init()
    if ctc:
        params["ctc"] = losses.init_ctc(key, width, 10.0, VOCAB)
    return slm, params


def toy_batch(rows: int = 4, seed: int = 0):
    """Rows of mixed lengths; the second has one token, the last has none."""
    rng = np.random.default_rng(seed)
    mel_length = rng.integers(12, 41, rows).astype(np.int32)
    mel_length[0] = 40
    token_length = rng.integers(1, 6, rows).astype(np.int32)
    token_length[[0, 1, -1]] = 5, 1, 0
    return {
        "mel": rng.normal(size=(rows, 40, 8)).astype(np.float32),
        "mel_length": mel_length,
        "tokens": rng.integers(5, VOCAB, (rows, 5)).astype(np.int32),
        "token_length": token_length,
        "index": np.arange(rows, dtype=np.int32),
    }


def toy_config(**changes):
    """A configuration for `toy_slm`; keys as "otreg.weight", dots written as __."""
    config = config_lib.default()
    config.batch_size, config.num_steps, config.log_every = 8, 20, 1
    config.optim.warmup_steps = 2
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def as_if_on(platform: str):
    """A context in which JAX lowers Pallas kernels for "cuda" or "tpu" without one: 0.12 asks what
    kind of device it is."""
    kinds = {"cuda": ("NVIDIA H100 80GB HBM3", None, "gpu"), "tpu": ("TPU v5p", 2, "tpu")}
    device = jax.sharding.AbstractDevice(*kinds[platform])
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
