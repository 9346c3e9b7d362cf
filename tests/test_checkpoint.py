"""Checkpoints on storage that fails: flipped bits, a full disk; and which of them stay."""

import contextlib
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from otreg_jax import checkpoint, optim, sharding, train_step
from otreg_jax import config as config_lib

MADE_OF = {"tokenizer": "t", "prompt": "{speech}\n", "frozen": {}}
OPTIMIZER = optim.make_optimizer(config_lib.default())


def state_of(step: int, width: int = 32) -> train_step.TrainState:
    """A state after `step` steps, its parameters noise: nothing of it compresses."""
    rng = np.random.default_rng(step)
    kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((width, 32), (32,)))
    params = {"adapter": {"in": {"kernel": jnp.array(kernel), "bias": jnp.array(bias)}}}
    return train_step.init_state(params, OPTIMIZER)._replace(step=jnp.int32(step))


def abstract(width: int = 32) -> train_step.TrainState:
    params = {"adapter": {"in": {"kernel": jnp.zeros((width, 32)), "bias": jnp.zeros(32)}}}
    return train_step.abstract_state(params, OPTIMIZER, sharding.data_mesh())


def assert_is(state, step: int, width: int = 32) -> None:
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step, width))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with checkpoints of the steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("saved")
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(state_of(4), 4, MADE_OF, {"dev_ce": 1.0})
        checkpoints.save(state_of(8), 8, MADE_OF, {"dev_ce": 2.0})
    return workdir


@contextlib.contextmanager
def flipped(path, position: int, bit: int):
    """The file with one bit of its byte at `position` inverted."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[position] ^= 1 << bit
    path.write_bytes(bytes(damaged))
    yield
    path.write_bytes(whole)


def test_a_flipped_bit_in_the_arrays_sends_to_the_one_before(saved, tmp_path, caplog):
    workdir = shutil.copytree(saved, tmp_path / "run")
    (data,) = (workdir / "checkpoints/8/state/d").iterdir()  # what is read; mostly noise
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(20):
        caplog.clear()
        with flipped(data, rng.integers(data.stat().st_size), rng.integers(8)):
            state = checkpoint.restore(workdir, abstract(), MADE_OF)
        assert_is(state, int(state.step))
        noticed += int(state.step) == 4 and "step 8 cannot be read, trying the one" in caplog.text
    assert noticed >= 19  # a bit in what no array is read from changes nothing
    assert_is(checkpoint.restore(workdir, abstract(), MADE_OF), 8)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "metrics/metrics", "state/_METADATA"])
def test_a_flipped_bit_in_a_description_is_no_trace(saved, tmp_path, name):
    workdir = shutil.copytree(saved, tmp_path / "run")
    description = workdir / "checkpoints/8" / name
    rng = np.random.default_rng(0)
    taken = set()
    for position in np.linspace(0, description.stat().st_size - 1, 30).astype(int):
        with flipped(description, position, rng.integers(8)):
            state = checkpoint.restore(workdir, abstract(), MADE_OF)
            with checkpoint.Checkpoints(workdir):  # training could go on
                pass
        assert_is(state, int(state.step))
        taken.add(int(state.step))
    assert 4 in taken


def test_a_damaged_checkpoint_is_replaced_when_training_comes_back_to_its_step(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    (workdir / "checkpoints/8/_CHECKPOINT_METADATA").write_text("{")
    assert_is(checkpoint.restore(workdir, abstract(), MADE_OF), 4)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save(state_of(8), 8, MADE_OF)
    assert_is(checkpoint.restore(workdir, abstract(), MADE_OF), 8)


def test_older_checkpoints_without_fingerprints_are_read(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    description = workdir / "checkpoints/8/_CHECKPOINT_METADATA"
    content = json.loads(description.read_text())
    content["custom_metadata"] = MADE_OF
    description.write_text(json.dumps(content))
    assert_is(checkpoint.restore(workdir, abstract(), MADE_OF), 8)


def test_durable_checkpoints_stay_beside_the_newest_and_the_best(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(state_of(step), step, MADE_OF, {"dev_ce": abs(step - 3)})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "4", "8", "10"}
    for step in (3, 4, 8, 10):
        assert_is(checkpoint.restore(tmp_path, abstract(), MADE_OF, which=str(step)), step)


def test_a_save_that_fails_is_named_at_once_and_the_next_one_is_made(tmp_path, caplog):
    """The disk is full for the second of three saves."""
    width = 20_000
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(1, width), 1, MADE_OF)
        checkpoints._settle()
        with full_disk(2**18):
            checkpoints.save(state_of(2, width), 2, MADE_OF)
            while not checkpoints.failure:
                checkpoints.look()
        assert f"the checkpoint {tmp_path}/checkpoints/2 could not be saved" in caplog.text
        assert_is(checkpoint.restore(tmp_path, abstract(width), MADE_OF), 1, width)
        checkpoints.save(state_of(3, width), 3, MADE_OF)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}
    assert_is(checkpoint.restore(tmp_path, abstract(width), MADE_OF), 3, width)


def test_a_run_whose_last_save_failed_does_not_end_well(tmp_path):
    with pytest.raises(OSError, match="checkpoints/1 could not be saved.*start the run again"):
        with full_disk(2**18), checkpoint.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(state_of(1, 20_000), 1, MADE_OF)
    with pytest.raises(KeyError):  # what went wrong before is not hidden by it
        with full_disk(2**18), checkpoint.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(state_of(1, 20_000), 1, MADE_OF)
            raise KeyError


@contextlib.contextmanager
def full_disk(room: int):
    """No file can become larger than `room` bytes: writers see it as they see a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
