"""A trained model is loaded as it was trained: on its own kind of mesh, straight into shards."""

import functools
import math

import jax
import numpy as np
import pytest
import toy_run
from toy_run import make_run, write_set

from otreg_jax import build, checkpoint, decoding, optim, pretrained, recognition, sharding
from otreg_jax.data import sets

MESHES = {"data": (-1, 1, 1), "fsdp": (1, -1, 1), "all": (2, 2, 2), "larger": (2, 16, 4)}


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("dev") / "dev", 6, seed=0)


@pytest.fixture(autouse=True)
def vocabulary_that_a_tensor_axis_divides(monkeypatch):
    monkeypatch.setattr(toy_run, "TEXTS", (*toy_run.TEXTS, "one two three"))


def run_of(workdir, dev, mesh=(-1, 1, 1), **changes):
    sizes = {f"mesh__{axis}": size for axis, size in zip(sharding.AXES, mesh, strict=True)}
    return make_run(workdir, dev=dev, **sizes, **changes)


def decoded(run, workdir):
    utterances, _ = sets.load_eval(run.config, workdir)
    with recognition.Partial(workdir / "partial.jsonl", {"mesh": str(run.mesh)}) as partial:
        skipped = workdir / "skipped.jsonl"
        settings = decoding.Settings(6)
        rows, _ = recognition.decode_sets(run, utterances, settings, 0, 8, skipped, "", partial)
    return rows


@pytest.mark.parametrize("kind", MESHES)
def test_every_kind_of_mesh_decodes_as_one_device(kind, dev, tmp_path, monkeypatch):
    workdir = run_of(tmp_path / "run", dev, MESHES[kind], freeze="^encoder/")
    run = build.load_run(workdir)
    shape = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2), "larger": (1, 2, 4)}[kind]
    assert tuple(run.mesh.shape.values()) == shape
    flat = optim.flat_paths(run.params)
    placed = sharding.tree_shardings(run.params, run.mesh)
    for path, expected in optim.flat_paths(placed).items():
        assert flat[path].sharding.is_equivalent_to(expected, flat[path].ndim), path
    one = functools.partial(sharding.mesh_at_hand, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "mesh_at_hand", one)
    alone = build.load_run(workdir)
    assert alone.mesh.size == 1
    for path, leaf in optim.flat_paths(alone.params).items():
        np.testing.assert_array_equal(np.array(leaf), np.array(flat[path]), err_msg=path)
    for many, single in zip(decoded(run, workdir), decoded(alone, workdir), strict=True):
        assert many["score"] == pytest.approx(single["score"], abs=1e-4)
        assert {**many, "score": 0} == {**single, "score": 0}


def test_nothing_is_made_that_the_checkpoint_or_a_file_holds(dev, tmp_path, monkeypatch):
    """When the checkpoint is read, the devices hold the frozen weights alone, once; afterwards the
    average of the weights and nothing else of the state."""
    workdir = run_of(tmp_path / "run", dev, (1, 8, 1), freeze="^llm/", optim__ema_decay=0.9)
    held, restore = {}, checkpoint.restore

    def restore_and_see(*args, **kwargs):
        held["before"] = device_bytes() - start
        return restore(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "restore", restore_and_see)
    start = device_bytes()
    run = build.load_run(workdir)
    _, frozen = optim.split(run.params, run.config.freeze)
    assert held["before"] == device_bytes(frozen)
    assert device_bytes() - start == device_bytes(run.params)


def device_bytes(tree=None) -> int:
    """Of a tree's arrays, or of all that live, over all devices."""
    arrays = jax.live_arrays() if tree is None else jax.tree.leaves(tree)
    elements = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * len(x.sharding.device_set)
    return sum(elements(x) * x.dtype.itemsize for x in arrays)


@pytest.mark.parametrize(
    "dtype, int8", [("float32", False), ("bfloat16", False), ("bfloat16", True)]
)
def test_frozen_weights_are_those_of_training(dtype, int8, dev, tmp_path):
    """Some read from files, some drawn from the seed, some of a part that also trains."""
    source = run_of(tmp_path / "source", dev)
    run = build.load_run(source)
    pretrained.save_llm(tmp_path / "llm", run.slm.llm, run.params["llm"], run.tokenizer)
    config = run.config
    config.llm.path, config.freeze = str(tmp_path / "llm"), "^encoder/|^llm/layers/(attn|mlp)"
    config.compute_dtype, config.frozen_int8 = dtype, int8
    slm, params = build.build(config, run.tokenizer, config.llm.path, run.mesh)
    _, expected = build.split(params, config)
    found = optim.flat_paths(build.frozen_params(slm, config, config.llm.path))
    expected = optim.flat_paths(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype
        np.testing.assert_array_equal(np.array(found[path]), np.array(leaf), err_msg=path)
