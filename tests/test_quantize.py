"""Frozen int8 kernels: rounding, products, training over any mesh, what is exported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_slm
from toy_run import metrics_of, tone_config, write_tones

from otreg_jax import build, checkpoint, export, optim, pretrained
from otreg_jax import train as train_lib
from otreg_jax.models import llm as llm_lib
from otreg_jax.models import lora, quantize

TOKENS_BL = np.array([[5, 9, 14, 7]])


def test_rounds_the_kernels_of_the_layers_to_half_a_step_and_leaves_the_rest():
    _, params = toy_slm()
    params["llm"]["layers"]["mlp"]["up"]["kernel"] = jnp.pad(
        params["llm"]["layers"]["mlp"]["up"]["kernel"][:, :, 1:], ((0, 0), (0, 0), (1, 0))
    )  # its first column holds nothing
    flat = optim.flat_paths(params)
    small = optim.flat_paths(quantize.to_int8(params))
    back = optim.flat_paths(quantize.from_int8(quantize.to_int8(params), "float32"))
    changed = {path for path in flat if small[path].dtype == jnp.int8}
    layers = ("llm/layers/attn/q", "llm/layers/mlp/down", "encoder/layers/attn/o")
    assert {f"{layer}/kernel" for layer in layers} < changed and back.keys() == flat.keys()
    assert all("/layers/" in path and path.endswith("/kernel") for path in changed)
    for path, leaf in flat.items():
        if path in changed:
            step = small[f"{path}_max"][..., None, :] / 127
            assert jnp.max(jnp.abs(small[path])) == 127
            assert jnp.all(jnp.abs(back[path] - leaf) <= 0.501 * step), path
        else:
            assert small[path] is leaf and back[path] is leaf
    assert jnp.all(back["llm/layers/mlp/up/kernel"][..., 0] == 0)


@pytest.mark.parametrize("layout", ["stacked", "for one-token steps"])
def test_the_product_is_that_of_the_unpacked_kernels(layout):
    slm, params = toy_slm()
    arrange = lambda params: params
    if layout != "stacked":
        arrange = functools.partial(llm_lib.for_steps, slm.llm.config)
    pattern = "llm/layers/attn/[qv]/kernel"
    int8 = lora.add(quantize.to_int8(params), pattern, 2, jax.random.key(0))
    int8 = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.3 if path[-1].key == "lora_b" else x, int8
    )
    apply = jax.jit(slm.llm.apply)
    logits = apply({"params": arrange(int8["llm"])}, TOKENS_BL)
    unpacked = quantize.from_int8(int8, "float32")
    np.testing.assert_allclose(logits, apply({"params": unpacked["llm"]}, TOKENS_BL), atol=1e-5)
    exact = apply({"params": params["llm"]}, TOKENS_BL)
    assert jnp.abs(logits - exact).max() > 1e-2  # LoRA is not lost


def test_trains_on_any_mesh_and_is_exported_as_it_was_evaluated(tmp_path):
    manifest = write_tones(tmp_path)
    changes = dict(
        freeze=r"^(encoder|llm)/(?!.*/lora_[ab]$)",
        lora__pattern="llm/layers/attn/[qv]/kernel",
        num_steps=4,
        data__num_buckets=1,
        frozen_int8=True,
    )
    train_lib.train(tone_config(manifest, **changes), tmp_path / "int8")
    axes = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    train_lib.train(tone_config(manifest, **changes, **axes), tmp_path / "split")
    ce = lambda name: [line["ce"] for line in metrics_of(tmp_path / name).values()]
    np.testing.assert_allclose(ce("split"), ce("int8"), rtol=1e-5)

    run = build.load_run(tmp_path / "int8")
    assert run.params["llm"]["layers"]["mlp"]["down"]["kernel"].dtype == jnp.int8
    export.export(run, tmp_path / "out")
    llm, params = pretrained.load_llm(tmp_path / "out" / "llm")
    logits = jax.jit(run.slm.llm.apply)({"params": run.params["llm"]}, TOKENS_BL)
    exported = jax.jit(llm.apply)({"params": params}, TOKENS_BL)
    np.testing.assert_allclose(exported, logits, atol=1e-4)

    # What was exported is the base of another run: each kernel is rounded once it is read. That may
    # depend on the device, so a run that goes on compares the columns' maxima alone.
    parts = {f"{part}__path": str(tmp_path / "out" / part) for part in ("encoder", "llm")}
    config = tone_config(manifest, **changes, **parts)
    _, based = build.build(config, run.tokenizer, config.llm.path)
    wanted = quantize.to_int8(params)
    jax.tree.map(np.testing.assert_array_equal, lora.strip(based["llm"]), wanted)
    _, frozen = build.split(based, config)
    compared = checkpoint.provenance(config, run.tokenizer, frozen)["frozen"]
    assert {path for path in compared if "mlp/up" in path} == {
        "encoder/layers/mlp/up/bias",
        "encoder/layers/mlp/up/kernel_max",
        "llm/layers/mlp/up/kernel_max",
    }


def test_nothing_to_quantize_is_an_error():
    _, params = toy_slm()
    with pytest.raises(ValueError, match="frozen_int8: no kernel .* is frozen; set freeze"):
        quantize.to_int8({"adapter": params["adapter"]})
