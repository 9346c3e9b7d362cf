"""Adapters of every kind: lengths, padding."""

import functools

import jax
import numpy as np
import pytest

from otreg_jax import sharding
from otreg_jax.models.adapter import KINDS, Adapter, AdapterConfig, output_length


@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_matters_and_the_length_is_known(kind):
    config = AdapterConfig(
        in_dim=6, out_dim=10, hidden_dim=8, kind=kind, stack=3, num_heads=2, num_queries=2
    )
    adapter = Adapter(config)
    x_BSE = np.random.default_rng(0).normal(size=(3, 11, 6)).astype(np.float32)
    length_B = np.array([11, 4, 0], np.int32)
    params = jax.jit(adapter.init)(jax.random.key(0), x_BSE, length_B)["params"]
    sharding.tree_shardings({"adapter": params}, sharding.data_mesh())  # every one has a rule
    for row, length in enumerate(length_B):
        x_BSE[row, length:] = np.nan

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x_BSE):
        speech_BSD, speech_length_B = adapter.apply({"params": params}, x_BSE, length_B)
        return speech_BSD.var(), (speech_BSD, speech_length_B)

    (_, (speech_BSD, speech_length_B)), (grads, grad_BSE) = loss(params, x_BSE)
    assert speech_BSD.shape == (3, output_length(config, 11), 10)
    np.testing.assert_array_equal(speech_length_B, output_length(config, length_B))
    alone_BSD, alone_length_B = jax.jit(adapter.apply)(
        {"params": params}, x_BSE[1:2, :4], length_B[1:2]
    )
    assert alone_length_B[0] == speech_length_B[1] == alone_BSD.shape[1]
    np.testing.assert_allclose(speech_BSD[1, : speech_length_B[1]], alone_BSD[0], atol=1e-5)
    for row, end in enumerate(speech_length_B):
        assert not speech_BSD[row, end:].any()

    # Every valid position is read, no other one, and nothing is NaN beside NaN padding.
    assert all(np.isfinite(leaf).all() for leaf in (speech_BSD, *jax.tree.leaves(grads)))
    read = np.abs(grad_BSE).sum(-1) > 0
    np.testing.assert_array_equal(read, np.arange(11) < length_B[:, None])


def test_unknown_kind_and_bad_heads_are_refused():
    with pytest.raises(ValueError, match="unknown kind 'lstm', choose from mlp"):
        AdapterConfig(in_dim=4, out_dim=4, hidden_dim=4, kind="lstm")
    with pytest.raises(ValueError, match="hidden_dim 10 must be a multiple of num_heads 4"):
        AdapterConfig(in_dim=4, out_dim=4, hidden_dim=10, kind="qformer", num_heads=4)
