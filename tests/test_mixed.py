"""LLMs whose layers have several shapes, inside the whole: LoRA, a mesh, decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from toy import toy_batch, toy_slm

from otreg_jax import decoding, optim, sharding
from otreg_jax.models import lora
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.block import WideHeads
from otreg_jax.models.delta import DeltaHeads
from otreg_jax.models.llm import LLM

SHAPES = {
    "wide": dict(
        sliding_window=3,
        wide=WideHeads(head_dim=12, num_kv_heads=1, value_is_key=True),
        value_norm=True,
        layer_scalar=True,
    ),
    "linear": dict(
        norm_eps=1e-2, gated=True, delta=DeltaHeads(1, 2, key_dim=4, value_dim=6, conv_width=3)
    ),
}
KERNELS = r"llm/layers/\w+/(attn/[qo]|delta/(qkv|o))/kernel"


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    """A toy SLM whose LLM has two repetitions of two layers."""
    slm, params = toy_slm()
    shapes = SHAPES[request.param] | dict(num_layers=4, local_layers=(True, False) * 2)
    llm = LLM(dataclasses.replace(slm.llm.config, **shapes))
    tokens = jnp.zeros((1, 2), jnp.int32)
    params["llm"] = jax.jit(llm.init)(jax.random.key(3), tokens)["params"]
    return slm._replace(llm=llm), params


def test_pairs_of_every_shape_learn_and_a_mesh_changes_nothing(model):
    slm, params = model
    params = lora.add(params, KERNELS, 2, jax.random.key(1))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.3 if path[-1].key == "lora_b" else x, params
    )
    batch = toy_batch()

    def loss(params, slm):
        out = slm_lib.forward(slm, params, batch, layer=3)
        return slm_lib.logits(slm, params, out.hidden_BTD).var() + out.speech_BSD.var()

    def gradient(slm, params):
        return jax.jit(jax.grad(loss), static_argnums=1)(params, slm)

    alone = optim.flat_paths(gradient(slm, params))
    pairs = [path for path in alone if path.endswith(lora.PAIR)]
    assert len({path.split("/")[2] for path in pairs}) == 2 and len(pairs) == 8
    assert all(np.abs(alone[path]).max() > 0 for path in pairs)

    mesh = jax.make_mesh((2, 2, 2), sharding.AXES, (AxisType.Auto,) * 3)
    spread = slm_lib.make(*(part.config for part in slm[:3]), slm.prompt, mesh)
    placed = jax.device_put(params, sharding.tree_shardings(params, mesh))
    for path, g in optim.flat_paths(gradient(spread, placed)).items():
        np.testing.assert_allclose(g, alone[path], atol=1e-5, err_msg=path)


def test_a_batch_decodes_as_each_alone(model):
    """Prompts of several lengths: what a linear layer keeps must not hold their padding."""
    slm, params = model
    llm = jax.tree.map(lambda x: 2.5 * x, params["llm"])
    x_BPD, length_B = jax.random.normal(jax.random.key(5), (2, 6, 16)), jnp.array([6, 3])

    def search(x_BPD, length_B):
        settings = decoding.Settings(5, beam_width=2)
        return decoding.beam_search(slm.llm, llm, x_BPD, length_B, slm.prompt.eos, settings)

    together, alone = search(x_BPD, length_B), search(x_BPD[1:, :3], length_B[1:])
    np.testing.assert_array_equal(together.tokens[1:], alone.tokens)
    np.testing.assert_allclose(together.score[1:], alone.score, atol=1e-4)
