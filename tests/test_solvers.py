"""Every Sinkhorn backend against float64 log-domain iterations; kernels for machines CI lacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from toy import as_if_on

from otreg_jax import otreg
from otreg_jax.sinkhorn import pallas

S, T, D = 37, 13, 16
NUM_ITERS = 50
EPSILONS = 0.02, 0.05, 0.1, 0.5
EXAMPLES = (
    "random",
    "aligned .2",
    "aligned .6",
    "aligned .9",
    "sharp",
    "duplicate tokens",
    "one speech position",
    "one token",
    "no speech",
    "no text",
    "full",
)


@functools.cache
def make_batch():
    """Costs [B, S, T] with NaN at padding, a [B, S], b [B, T]: one row for each of EXAMPLES."""
    rng = np.random.default_rng(0)
    size = len(EXAMPLES)
    speech_length_B = np.array([30, 35, 33, 29, 36, 31, 1, 22, 0, 17, S])
    text_length_B = np.array([9, 11, 13, 10, 12, 8, 5, 1, 6, 0, T])
    speech_mask_BS = np.arange(S) < speech_length_B[:, None]
    text_mask_BT = np.arange(T) < text_length_B[:, None]
    text_BTD = rng.normal(size=(size, T, D))
    text_BTD[EXAMPLES.index("duplicate tokens"), 3:] = text_BTD[
        EXAMPLES.index("duplicate tokens"), 0
    ]
    spoken_BSD = np.stack(
        [
            text[np.arange(S) * max(t, 1) // S]
            for text, t in zip(text_BTD, text_length_B, strict=True)
        ]
    )
    noise_BSD = rng.normal(size=(size, S, D))
    alignment_B = np.array([0, 0.2, 0.6, 0.9, 0.9, 0.6, 0, 0, 0, 0, 0.6])[:, None, None]
    speech_BSD = alignment_B * spoken_BSD + np.sqrt(1 - alignment_B**2) * noise_BSD
    unit = speech_BSD / np.linalg.norm(speech_BSD, axis=2, keepdims=True)
    cost_BST = 1 - np.einsum(
        "bsd,btd->bst", unit, text_BTD / np.linalg.norm(text_BTD, axis=2, keepdims=True)
    )
    position_BST = otreg.position_cost(speech_mask_BS, text_mask_BT)
    cost_BST[EXAMPLES.index("sharp")] += 3 * position_BST[EXAMPLES.index("sharp")]
    cost_BST[~speech_mask_BS] = np.nan
    cost_BST.swapaxes(1, 2)[~text_mask_BT] = np.nan
    a_BS = speech_mask_BS / np.maximum(speech_length_B, 1)[:, None]
    b_BT = text_mask_BT / np.maximum(text_length_B, 1)[:, None]
    return [x.astype(np.float32) for x in (cost_BST, a_BS, b_BT)]


@functools.cache
def reference(epsilon, speech_tau, num_iters=NUM_ITERS):
    """Plans [B, S, T] by float64 log-domain iterations, one example at a time, without padding."""
    cost_BST, a_BS, b_BT = (x.astype(np.float64) for x in make_batch())
    plan_BST = np.zeros_like(cost_BST)
    for cost_ST, a_S, b_T, plan_ST in zip(cost_BST, a_BS, b_BT, plan_BST, strict=True):
        s, t = np.count_nonzero(a_S), np.count_nonzero(b_T)
        if s and t:
            log_kernel_ST = -cost_ST[:s, :t] / epsilon
            f_S = np.zeros(s)
            for _ in range(num_iters):
                g_T = np.log(b_T[:t]) - np.logaddexp.reduce(f_S[:, None] + log_kernel_ST, 0)
                f_S = np.log(a_S[:s]) - np.logaddexp.reduce(g_T + log_kernel_ST, 1)
                f_S = speech_tau * f_S
            plan_ST[:s, :t] = np.exp(f_S[:, None] + g_T + log_kernel_ST)
    return plan_BST


transport_plan = jax.jit(
    otreg.transport_plan, static_argnames=["num_iters", "speech_tau", "backend"]
)


@pytest.mark.parametrize("speech_tau", [1.0, 0.5])
@pytest.mark.parametrize("backend", otreg.BACKENDS)
def test_every_backend_runs_the_reference_iterations(backend, speech_tau):
    for epsilon in EPSILONS:  # traced: one compilation
        plan_BST = transport_plan(
            *make_batch(),
            epsilon=epsilon,
            num_iters=NUM_ITERS,
            speech_tau=speech_tau,
            backend=backend,
        )
        assert plan_BST.dtype == jnp.float32
        error_B = np.abs(plan_BST - reference(epsilon, speech_tau)).sum(axis=(1, 2))
        for example, error in zip(EXAMPLES, error_B, strict=True):
            assert error <= 1e-4, (example, epsilon)


@pytest.mark.parametrize("chip", [pallas.TPU, pallas.GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("speech_tau", [1.0, 0.95, 0.5])
def test_pallas_streams_what_does_not_fit(chip, speech_tau, monkeypatch):
    """In three blocks, the last of which only the longest examples reach."""
    small = chip._replace(largest_tile=0, block=16)
    monkeypatch.setattr(pallas, "INTERPRETED", small)
    solve = functools.partial(otreg.transport_plan, speech_tau=speech_tau, backend="pallas")
    solve = jax.jit(solve, static_argnames="num_iters")
    for epsilon in EPSILONS:
        plan_BST = solve(*make_batch(), epsilon=epsilon, num_iters=NUM_ITERS)
        error_B = np.abs(plan_BST - reference(epsilon, speech_tau)).sum(axis=(1, 2))
        assert error_B.max() <= 1e-4, (EXAMPLES[error_B.argmax()], epsilon)
    plan_BST = solve(*make_batch(), epsilon=0.05, num_iters=1)
    assert np.abs(plan_BST - reference(0.05, speech_tau, 1)).sum(axis=(1, 2)).max() <= 1e-4


@pytest.mark.parametrize("num_iters", [1, 2, 22, 43])  # no block, a rest, one and two whole blocks
def test_blocks_add_up_to_the_iterations_asked_for(num_iters):
    plan_BST = transport_plan(*make_batch(), epsilon=0.05, num_iters=num_iters, backend="xla")
    error_B = np.abs(plan_BST - reference(0.05, 1.0, num_iters)).sum(axis=(1, 2))
    assert error_B.max() <= 1e-4
    if num_iters == 22:  # one iteration more or less would be seen
        assert np.abs(reference(0.05, 1.0, 22) - reference(0.05, 1.0, 21)).sum((1, 2)).max() > 1e-3


@pytest.mark.parametrize("backend", ["xla", "pallas", "pallas, streamed"])
def test_extreme_costs_stay_finite(backend, monkeypatch):
    """Costs of thousands of epsilons, and outliers beyond what an exponential can hold."""
    backend, _, streamed = backend.partition(", ")
    if streamed:
        small = pallas.GPU._replace(largest_tile=0, block=16)
        monkeypatch.setattr(pallas, "INTERPRETED", small)
    cost_BST, a_BS, b_BT = make_batch()
    cost_BST = cost_BST.copy()
    cost_BST[:, ::5] += 10
    for speech_tau in 1.0, 0.5:
        plan_BST = transport_plan(
            cost_BST,
            a_BS,
            b_BT,
            epsilon=2e-3,
            num_iters=NUM_ITERS,
            speech_tau=speech_tau,
            backend=backend,
        )
        assert np.all(np.isfinite(plan_BST))
        solvable_B = (a_BS.sum(axis=1) > 0) & (b_BT.sum(axis=1) > 0)
        mass_B = plan_BST.sum(axis=(1, 2))[solvable_B]
        assert np.all(mass_B > 0.3) and np.all(mass_B < 1.01)


def test_gradients_agree():
    rng = np.random.default_rng(1)
    cost_BST, a_BS, b_BT = make_batch()
    speech_BSD = rng.normal(size=(len(EXAMPLES), S, D)).astype(np.float32)
    text_BTD = rng.normal(size=(len(EXAMPLES), T, D)).astype(np.float32)
    speech_BSD[a_BS == 0], text_BTD[b_BT == 0] = np.nan, np.nan

    @functools.partial(jax.jit, static_argnames="backend")
    def gradient(speech_BSD, backend):
        def loss(speech_BSD):
            return otreg.regularizer(
                speech_BSD, text_BTD, a_BS > 0, b_BT > 0, position_weight=0.5, backend=backend
            ).loss

        return jax.grad(loss)(speech_BSD)

    expected_BSD = gradient(speech_BSD, "ott")
    for backend in otreg.BACKENDS.keys() - {"ott"}:
        error = np.linalg.norm(gradient(speech_BSD, backend) - expected_BSD)
        assert error <= 1e-3 * np.linalg.norm(expected_BSD), backend


def test_no_product_is_below_full_precision():
    """On accelerators the default would run float32 products in bfloat16 or TF32."""
    cost_BST, a_BS, b_BT = make_batch()
    speech_BSD, text_BTD = np.zeros((11, S, D), jnp.bfloat16), np.zeros((11, T, D), jnp.bfloat16)

    def loss(speech_BSD):
        masks = a_BS > 0, b_BT > 0
        return otreg.regularizer(speech_BSD, text_BTD, *masks, center="pcs", backend="xla").loss

    program = str(jax.make_jaxpr(jax.grad(loss))(speech_BSD))
    assert program.count("dot_general[") >= 8  # cost and gradient, centring, two in every block
    assert program.count("dot_general[") == program.count(
        "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    )


def data_mesh(devices):
    return Mesh(np.array(devices), ("data",))


def sharded_solve(mesh, backend):
    solve = functools.partial(
        otreg.transport_plan, epsilon=0.05, num_iters=NUM_ITERS, backend=backend
    )
    return jax.jit(
        jax.shard_map(solve, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    )


def test_pallas_under_shard_map():
    batch = [x[:8] for x in make_batch()]
    plan_BST = sharded_solve(data_mesh(jax.devices()[:8]), "pallas")(*batch)
    error_B = np.abs(plan_BST - reference(0.05, 1.0)[:8]).sum(axis=(1, 2))
    assert error_B.max() <= 1e-4


@pytest.mark.parametrize("platform, call", [("tpu", "tpu_custom_call"), ("cuda", "triton")])
@pytest.mark.parametrize("speech_tau", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(S, T), (8000, 256)], ids=str)  # the latter fits nowhere
def test_pallas_lowers_for(platform, call, speech_tau, shape):
    s, t = shape
    batch = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(8, s, t), (8, s), (8, t)]]
    with as_if_on(platform):
        traced = transport_plan.trace(
            *batch, epsilon=0.05, num_iters=NUM_ITERS, speech_tau=speech_tau, backend="pallas"
        )
        assert call in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "backend, shape",
    [
        ("xla", (150, 32)),
        ("xla", (1500, 128)),
        ("pallas", (150, 32)),
        ("pallas", (1500, 128)),
        ("pallas", (8000, 256)),
    ],
    ids=str,
)
def test_compiles_for_tpu(tpu_devices, backend, shape):
    mesh = data_mesh(tpu_devices)
    s, t = shape
    batch = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P("data")))
        for shape in [(8, s, t), (8, s), (8, t)]
    ]
    program = sharded_solve(mesh, backend).lower(*batch).compile().as_text()
    assert ("tpu_custom_call" in program) == (backend == "pallas")
    assert "all-gather" not in program and "all-reduce" not in program
