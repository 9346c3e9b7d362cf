"""Ahead-of-time compilation, FLOPs, and what the compiled step must and must not hold."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy import toy_config
from toy_run import tone_config, write_recipe

from otreg_jax import aot, compiler, flops, losses, sharding
from otreg_jax.data import bucketing

pytestmark = pytest.mark.shipped
FRAMES, TOKENS = 64, 7


def config_of(**changes):
    """Sizes that occur nowhere else in the program: LLM width 24, MLP 40, 3 layers, encoder 16."""
    changes = {
        "batch_size": 88,
        "data.num_mels": 8,
        "tokenizer.vocab_size": 50,
        "encoder.embed_dim": 16,
        "encoder.num_layers": 1,
        "encoder.num_heads": 2,
        "encoder.mlp_dim": 32,
        "llm.embed_dim": 24,
        "llm.num_layers": 3,
        "llm.mlp_dim": 40,
        "llm.num_heads": 2,
        "llm.num_kv_heads": 1,
        "llm.head_dim": 8,
        "adapter.hidden_dim": 16,
        "adapter.stack": 2,
        "otreg.weight": 1.0,
        "otreg.layer": 1,
        "otreg.center": "mean",
        "otreg.text_set": "sequence",
        "mesh.data": 1,
        "mesh.fsdp": 8,
        "otreg.num_iters": 30,
        "llm.pretrain.num_steps": 1,
    } | changes
    config = toy_config()
    config.update_from_flattened_dict(changes)
    return config


@functools.lru_cache
def compiled(freeze: str):
    """(HLO text, memory analysis, arguments) of the step with fsdp=8."""
    config = config_of(freeze=freeze)
    slm, step_of, arguments = aot.abstract_step(config, jax.devices(), FRAMES, TOKENS)
    program = step_of(slm).lower(*arguments).compile()
    return program.as_text(), program.memory_analysis(), arguments


def test_no_collective_inside_sinkhorn_and_no_float64():
    hlo, _, _ = compiled("^encoder/positions/")
    assert "f64[" not in hlo
    bodies = set(re.findall(r"body=%?([\w.-]+)", hlo))
    headers = re.compile(r"^%?([\w.-]+) (\([^\n]*)\{$(.*?)^\}", re.M | re.S)
    plan = f"f32[{88 // 8},{FRAMES // 2 // 2},{TOKENS}]"
    sinkhorn = [m[3] for m in headers.finditer(hlo) if m[1] in bodies and plan in m[2]]
    assert sinkhorn, "the loop over plans was not found"
    for text in sinkhorn:
        assert not re.search("all-reduce|all-gather|all-to-all|collective-permute", text)


def test_the_state_is_donated_and_frozen_weights_have_no_gradient():
    hlo, memory, (state, frozen, _) = compiled("^encoder/positions/|^llm/")
    assert memory.alias_size_in_bytes >= aot._bytes(state)
    # The gradient of a layer stack is a stack that a loop fills slice by slice.
    stacked = r"= f32\[3,(3|24),(40|5)\]\S* dynamic-update-slice\("
    assert "llm" in frozen and not re.search(stacked, hlo)
    trained, _, (_, frozen, _) = compiled("^encoder/positions/")
    assert re.search(stacked, trained)
    # What OTReg aims at stays: a copy of the layers below, in shards like theirs.
    target = frozen["target"]["llm"]
    assert target["layers"]["mlp"]["up"]["kernel"].sharding.shard_shape((1, 24, 40)) == (1, 3, 40)


def test_activations_are_spread_by_rows_though_weights_are_split_by_width():
    hlo, _, _ = compiled("^encoder/positions/|^llm/")
    everywhere = re.findall(r"f32\[88,\d+,\d+\]", hlo.replace("f32[88,64,8]", ""))
    assert not everywhere, sorted(set(everywhere))


def test_a_frozen_vocabulary_is_gathered_once_and_not_for_each_piece_of_the_logits(monkeypatch):
    monkeypatch.setattr(losses.common, "LOGITS_AT_A_TIME", 2 * 56)
    changes = {"ctc.weight": 0.3, "tokenizer.vocab_size": 56}
    config = config_of(freeze="^encoder/positions/|^llm/", **changes)
    slm, step_of, arguments = aot.abstract_step(config, jax.devices(), FRAMES, TOKENS)
    hlo = step_of(slm).lower(*arguments).compile().as_text()
    gathers = [
        line for line in hlo.splitlines() if re.search(r"f32\[56,24\]\S* all-gather\(", line)
    ]
    assert len(gathers) == 1 and "/while/" not in gathers[0], gathers


def test_report_on_cpu_adds_up_and_matches_the_compiler():
    config = config_of(freeze="^encoder/positions/|^llm/")
    report = aot.compile_step(config, jax.devices(), FRAMES, TOKENS)
    _, memory, arguments = compiled("^encoder/positions/|^llm/")
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert report.peak == held + memory.temp_size_in_bytes == sum(report.memory.values())
    assert compiler.peak_memory(memory, "tpu") == memory.peak_memory_in_bytes
    assert report.fits is None and report.capacity is None
    held = sum(size for name, size in report.memory.items() if "buffers" not in name)
    assert held <= memory.argument_size_in_bytes <= held + 64
    shown = aot.describe(report, jax.devices(), config, FRAMES, TOKENS)
    assert "8 x cpu; mesh data=1, fsdp=8, tensor=1; batch 88" in shown
    assert "all-gather" in shown and "all-reduce" in shown


def test_flops_of_products_loops_and_gradients():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    product = 2 * 4 * 8 * 8
    assert flops.count(jnp.matmul, x, w) == product
    scanned = lambda w: jax.lax.fori_loop(0, 5, lambda _, c: jnp.tanh(c @ w), x).sum()
    assert flops.count(jax.jit(scanned), w) == 5 * product
    assert flops.count(jax.grad(scanned), w) == 5 * 3 * product
    either = lambda w: jax.lax.cond(w[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)
    assert flops.count(either, w) == 2 * product
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (2,), "SAME")
    signal, kernel = jnp.ones((3, 4, 10)), jnp.ones((6, 4, 3))
    assert flops.count(conv, signal, kernel) == 2 * (3 * 6 * 5) * 4 * 3


def test_flops_of_the_step_are_those_xla_counts_in_an_unrolled_one():
    """One layer of everything, so that XLA, which counts a loop's body once, counts right."""
    config = config_of(**{"llm.num_layers": 1, "otreg.weight": 0.0, "mesh.fsdp": 1})
    config.llm.mlp_dim, config.llm.embed_dim = 512, 128  # products dominate
    slm, step_of, arguments = aot.abstract_step(config, jax.devices()[:1], FRAMES, TOKENS)
    by_xla = step_of(slm).lower(*arguments).compile().cost_analysis()["flops"]
    counted = aot.compile_step(config, jax.devices()[:1], FRAMES, TOKENS).flops
    np.testing.assert_allclose(counted, by_xla, rtol=0.1)


def test_collectives_are_counted_with_their_loops():
    mesh = sharding.data_mesh()
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def step(x):  # 5 sums over the mesh in a loop, one gather behind it
        def body(_, total):
            return total + jax.lax.with_sharding_constraint((x * total[0]).sum(axis=0), whole)

        total = jax.lax.fori_loop(0, 5, body, jnp.ones(128))
        return total, jax.lax.with_sharding_constraint(x * 2, whole)

    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=split)
    program = jax.jit(step).lower(x).compile().as_text()
    counted = compiler.count_collectives(program)
    assert counted["all-reduce"] == (5, 5 * 128 * 4)
    assert counted["all-gather"] == (1, 8 * 128 * 4)


def test_a_token_moves_and_the_weights_stay(monkeypatch):
    """With fsdp a step of decoding sums products over the devices: no kernel is gathered for it."""
    texts, count = [], compiler.count_collectives
    monkeypatch.setattr(
        compiler, "count_collectives", lambda text: texts.append(text) or count(text)
    )
    config = config_of(**{"tokenizer.vocab_size": 56}, freeze="^encoder/positions/|^llm/")
    report = aot.compile_decode(config, jax.devices(), FRAMES, TOKENS)
    (hlo,) = texts
    assert report.mesh == {"data": 1, "fsdp": 8, "tensor": 1} and report.fits is None
    in_loop = [line for line in hlo.splitlines() if "greedy)/while/body" in line]
    gathered = [line for line in in_loop if re.search(r"= \S+ all-gather\(", line)]
    kernels = r"= f32\[(3,|1,)?(24,40|40,24|24,16|16,24|24,8|56,24|24,56)\]"
    assert in_loop and not [line for line in gathered if re.search(kernels, line)]
    # Counted once: a loop that may end early.
    once = aot.compile_decode(config, jax.devices(), FRAMES, 2 * TOKENS).collectives
    assert once["all-reduce"][0] == report.collectives["all-reduce"][0]
    shown = aot.describe(report, jax.devices(), config, FRAMES, TOKENS)
    assert "keys and values" in shown and "collectives of the prompt and one token" in shown


def test_memory_that_does_not_suffice_halves_the_batch():
    def compile_at(batch):  # 10 GiB and half a GiB for every utterance
        peak = (10 + batch / 2) * aot.GIB
        return aot.Report(batch, {}, int(peak), 16 * aot.GIB, 0, {}, 0, {})

    assert aot.largest_batch(compile_at, compile_at(64), 4).batch_size == 12
    assert aot.largest_batch(compile_at, compile_at(4), 4).batch_size == 12
    assert aot.largest_batch(compile_at, compile_at(16), 16) is None


def test_the_largest_batches_of_all_shapes_come_to_settings_that_fit():
    def compile_at(batch, frames, tokens):  # 10 GiB, and a quarter for every second
        peak = (10 + batch * frames / 400) * aot.GIB
        return aot.Report(batch, {}, int(peak), 16 * aot.GIB, 0, {}, 0, {})

    shapes = [(100, 4), (200, 8), (400, 16)]
    found = aot.largest_batches(compile_at, compile_at(64, 400, 16), 2, shapes)
    rows = {frames: report.batch_size for (frames, _), report in found.items()}
    assert rows == {400: 6, 200: 12, 100: 24}
    lines, settings = aot.describe_batches(found, 2)
    assert settings == {"batch_size": 6, "batch_seconds": 24}
    assert lines[-1] == "--config.batch_size=6 --config.batch_seconds=24"
    fitting = bucketing.rows_by_seconds(shapes, settings["batch_seconds"], 2)
    assert fitting == (24, 12, 6)
    assert aot.describe_batches({}, 8)[0][0].startswith("no batch fits, not even 8")


def test_what_does_not_fit_is_read_from_either_message_of_the_compiler():
    """As libtpu 0.0.42 words them."""
    ran_out = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    ran_out += "temporaries (16.22G) exceeds available HBM (15.75G)."
    sizes = int(16.22 * aot.GIB), int(15.75 * aot.GIB)
    assert compiler.needed_and_available(ran_out) == sizes
    used = "Ran out of memory in memory space hbm. Used 96.50G of 95.74G hbm. Exceeded by 776.0M."
    assert compiler.needed_and_available(used) == (int(96.5 * aot.GIB), int(95.74 * aot.GIB))
    assert compiler.needed_and_available("INTERNAL: Mosaic failed to compile") is None
    report = aot.Report(8, {}, *sizes, 0, {}, 0, {})
    shown = aot.describe(report, jax.devices(), config_of(), FRAMES, TOKENS)
    assert re.search(r"peak, at least +16.220 of 15.75  DOES NOT FIT", shown)


def test_settings_that_match_nothing_end_before_anything_is_compiled(tmp_path, capsys):
    recipe = write_recipe(tmp_path, tone_config("nowhere.jsonl", freeze="^encodr/"))
    assert aot.cli([f"--config={recipe}", "--topology=v5e:4x4"]) == 1
    assert "freeze='^encodr/': matches no parameter" in capsys.readouterr().err


def test_unknown_topologies_say_what_they_look_like():
    with pytest.raises(ValueError, match="'v9:1x1'.*cannot be described(.|\n)*libtpu"):
        aot.devices_of("v9:1x1")


@pytest.mark.parametrize(
    "kind, terabytes_per_second, gigabytes",
    [
        ("TPU v5 lite", 0.82, 17.2),
        ("TPU v5p", 2.77, 102),
        ("TPU7x", 3.69, 103),
        ("NVIDIA H200", 4.8, 141),
        ("NVIDIA H100 80GB HBM3", 3.35, 85.9),
        ("NVIDIA B200", 8, 180),
        ("NVIDIA GB200", 8, 186),
        ("NVIDIA L40S", 0.864, 48),
    ],
)
def test_chips_are_told_apart(kind, terabytes_per_second, gigabytes):
    chip = flops.chip(types.SimpleNamespace(device_kind=kind))
    assert chip.bandwidth == pytest.approx(1e12 * terabytes_per_second)
    assert chip.memory == pytest.approx(1e9 * gigabytes, rel=0.01)
    # Everything made since 2020 needs some hundred products to pay for reading a byte.
    assert 100 < chip.flops / chip.bandwidth < 600


def test_ironwood_is_two_devices_a_chip(tpu_devices):
    del tpu_devices  # libtpu is there
    devices = aot.devices_of("tpu7x:2x2x1")
    assert len(devices) == 8 and flops.chip(devices[0]).memory == 96 * aot.GIB
