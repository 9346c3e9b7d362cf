"""Attention kernels against each other, and what is refused."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from otreg_jax import sharding
from otreg_jax.models.attention import attention, choose_kernel

B, L, H, K, d = 4, 150, 4, 2, 8  # two blocks of 128, the second one mostly padding
CASES = {
    "causal": dict(is_causal=True),
    "window": dict(is_causal=True, window=20, softcap=5.0),
    "encoder": dict(length_B=np.array([L, 70, 1, 130], np.int32)),
}


def make_inputs():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, L, heads, d)).astype(np.float32) for heads in (H, K, K))
    return q, k, v


def loss(q, k, v, options, kernel, mesh=None):
    """Of valid positions, and the outputs there."""
    y = attention(q, k, v, scale=d**-0.5, kernel=kernel, mesh=mesh, **options)
    valid = jnp.arange(L) < options.get("length_B", np.full(B, L))[:, None]
    y = jnp.where(valid[..., None, None], y, 0)
    return jnp.sum(jnp.sin(y)), y


def value_and_grads(case, kernel):
    options = CASES[case]
    f = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, y), grads = jax.jit(functools.partial(f, options=options, kernel=kernel))(*make_inputs())
    return y, grads


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["splash", "rows"])
def test_a_kernel_gives_what_xla_gives(kernel, case):
    with pltpu.force_tpu_interpret_mode(True):
        y, grads = value_and_grads(case, kernel)
    expected, expected_grads = value_and_grads(case, "xla")
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)
    for grad, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected, atol=1e-5, rtol=1e-5)


def compiled_for(devices, case, kernel="splash"):
    """Value and gradients with batch and heads split over all axes of a mesh, compiled."""
    mesh = Mesh(np.array(devices).reshape(2, -1, 2), sharding.AXES)
    options = {k: jnp.asarray(v) if k == "length_B" else v for k, v in CASES[case].items()}
    f = functools.partial(loss, options=options, kernel=kernel, mesh=mesh)
    specs = sharding.BATCH[0], None, "tensor"
    qkv = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*specs)))
        for x in make_inputs()
    ]
    return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)).lower(*qkv).compile()


@pytest.mark.parametrize("kernel", ["splash", "rows"])
def test_on_a_mesh_it_gives_what_one_device_gives(kernel):
    with pltpu.force_tpu_interpret_mode(True):
        program = compiled_for(jax.devices(), "encoder", kernel)
    (_, y), grads = program(*jax.device_put(make_inputs(), program.input_shardings[0]))
    expected, expected_grads = value_and_grads("encoder", "xla")
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)
    for grad, expected in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected, atol=1e-5, rtol=1e-5)


def test_rows_reads_no_further_than_the_part_in_which_an_example_ends():
    options = {"is_causal": True, "length_B": np.array([38, 1, 75, 114], np.int32)}
    end_B = np.array([38, 38, 75, 150])  # quarters of 150
    beyond = (jnp.arange(L) >= end_B[:, None])[..., None, None]
    run = lambda kernel, inputs: jax.jit(functools.partial(loss, options=options, kernel=kernel))(
        *inputs
    )
    _, y = run("rows", [jnp.where(beyond, jnp.nan, x) for x in make_inputs()])
    np.testing.assert_allclose(y, run("xla", make_inputs())[1], atol=1e-6)


def test_rows_keeps_the_scores_of_one_example():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(16, 256, heads, d)).astype(np.float32) for heads in (H, K, K))

    def temporary(kernel):
        f = lambda q, k, v: jnp.sum(attention(q, k, v, scale=1.0, kernel=kernel) ** 2)
        program = jax.jit(jax.grad(f, argnums=(0, 1, 2))).lower(q, k, v).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary("rows") < temporary("xla") / 3


@pytest.mark.parametrize("case", CASES)
def test_splash_compiles_for_tpu(tpu_devices, case):
    program = compiled_for(tpu_devices, case).as_text()
    assert program.count("tpu_custom_call") >= 3  # the forward pass and two of the backward pass
    assert "all-gather" not in program


def test_what_cannot_run_is_refused_and_auto_avoids_it():
    usual = dict(mesh=None, head_dim=64)
    assert choose_kernel("auto", dtype="bfloat16", **usual) == "rows"  # on this CPU
    assert choose_kernel("auto", dtype="bfloat16", biased=True, **usual) == "xla"
    with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU.*cpu.*only, .* is float32"):
        choose_kernel("cudnn", dtype="float32", **usual)
    with pytest.raises(ValueError, match="'splash' needs a TPU"):
        choose_kernel("splash", dtype="float32", **usual)
    with pytest.raises(ValueError, match="'flash': choose from auto, xla, cudnn, splash, rows"):
        choose_kernel("flash", dtype="float32", **usual)


def fake_device(platform, kind, **attributes):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **attributes)


@pytest.mark.parametrize(
    "device, changes, name",
    [
        (fake_device("tpu", "TPU v5"), {}, "splash"),
        (fake_device("gpu", "NVIDIA A100", compute_capability="8.0"), {}, "cudnn"),
        (fake_device("gpu", "NVIDIA A100", compute_capability="8.0"), {"head_dim": 256}, "xla"),
        (fake_device("gpu", "NVIDIA H100", compute_capability="9.0"), {"head_dim": 256}, "cudnn"),
        (fake_device("gpu", "NVIDIA H100", compute_capability="9.0"), {"softcap": 50.0}, "xla"),
        (fake_device("cpu", "cpu"), {"softcap": 50.0}, "rows"),
        (fake_device("gpu", "NVIDIA V100", compute_capability="7.0"), {}, "xla"),
        (fake_device("gpu", "AMD MI300", compute_capability="gfx942"), {}, "xla"),
    ],
)
def test_auto_takes_flash_attention_where_it_computes_what_is_asked(device, changes, name):
    mesh = types.SimpleNamespace(devices=np.array([device]))
    asked = dict(dtype="bfloat16", head_dim=64) | changes
    assert choose_kernel("auto", mesh, **asked) == name
