"""Packing: no padding is read between the utterances of a batch, and nothing changes."""

import dataclasses
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_batch, toy_config, toy_slm
from toy_run import metrics_of, tone_config

from otreg_jax import config as config_lib
from otreg_jax import flops, losses, packing, sharding, train, train_step
from otreg_jax.data import pipeline, sources
from otreg_jax.data.bucketing import Plan
from otreg_jax.models import encoders
from otreg_jax.models import slm as slm_lib
from otreg_jax.models.delta import DeltaHeads

ROWS = 8


def llm_length(slm, batch):
    """What each row of a batch takes in the LLM; fillers nothing."""
    length_B = slm_lib.positions_of(slm, "prefix" not in batch)(batch["mel_length"])
    length_B = length_B + batch["token_length"]
    length_B += sum(batch.get(f"{name}_length", 0) for name in ("prefix", "suffix"))
    return np.where(batch["index"] >= 0, length_B, 0)


def with_segments(slm, batch, rows, accumulation=1, spare=3):
    in_encoder_B = encoders.packed_length(slm.encoder.config)(batch["mel_length"])
    in_encoder_B = np.where(batch["index"] >= 0, in_encoder_B, 0)
    made = {}
    for name, length_B in {
        "segments": llm_length(slm, batch),
        "encoder_segments": in_encoder_B,
    }.items():
        most = length_B.reshape(-1, ROWS // rows, accumulation).sum(axis=1).max()
        made[name] = packing.segments(length_B, rows, most + spare, accumulation)
    return batch | made


def batch_of_own_prompts():
    """A batch with a prompt in each row, and a filler."""
    rng = np.random.default_rng(1)
    own = {"prefix": rng.integers(5, 24, (ROWS, 4)), "suffix": rng.integers(5, 24, (ROWS, 3))}
    own = {name: ids.astype(np.int32) for name, ids in own.items()}
    own["prefix_length"] = rng.integers(0, 5, ROWS).astype(np.int32)
    own["suffix_length"] = rng.integers(1, 4, ROWS).astype(np.int32)
    batch = toy_batch(ROWS) | own
    batch["index"][3], batch["token_length"][3] = -1, 0
    return batch


def with_llm(slm, params, **changes):
    """The SLM with another LLM, and parameters to match."""
    config = dataclasses.replace(slm.llm.config, **changes)
    slm = slm_lib.make(slm.encoder.config, slm.adapter.config, config, slm.prompt, slm.mesh)
    llm = jax.jit(slm.llm.init)(jax.random.key(5), jnp.zeros((1, 2), jnp.int32))["params"]
    return slm, params | {"llm": llm}


CONFIG = toy_config(ctc__weight=0.5, otreg__weight=1.0, otreg__layer=1)
CONFIG.otreg.layer_weights = (0.5, 0.5)


def test_packed_is_unpacked():
    """Loss, all metrics and every gradient: of a batch as it is, and packed, in micro-batches, on
    two devices. Rows have prompts of their own, one is a filler; the window of the local layer is
    shorter than an utterance."""
    slm, params = with_llm(*toy_slm(ctc=True), sliding_window=5, local_layers=(True, False))
    batch, schedules = batch_of_own_prompts(), losses.make_schedules(CONFIG)

    def gradient_of(slm, params, rows, totals=None):
        loss_of = lambda p: losses.loss_fn(
            slm, p, rows, 0, config=CONFIG, schedules=schedules, totals=totals
        )
        return jax.grad(loss_of, has_aux=True)(params)

    wanted = jax.jit(lambda p, batch: gradient_of(slm, p, batch))(params, batch)
    mesh = sharding.make_mesh(CONFIG, jax.devices()[:2])
    on_mesh = slm_lib.make(*(part.config for part in slm[:3]), slm.prompt, mesh)

    def in_parts(params, batch):
        totals = losses.batch_totals(on_mesh, params, batch, CONFIG)
        of_part = lambda rows: gradient_of(on_mesh, params, rows, totals)
        return train_step.sum_over_micro_batches(of_part, batch, 2)

    packed = sharding.to_global(with_segments(slm, batch, rows=4, accumulation=2), mesh)
    found = jax.jit(in_parts)(jax.device_put(params, sharding.tree_shardings(params, mesh)), packed)
    for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert wanted[1].keys() >= {"ce", "ctc", "otreg", "nearest_cosine", "token_accuracy"}


def test_linear_layers_are_packed_too():
    """A DeltaNet's state and its convolution begin anew with each utterance."""
    changes = dict(delta=DeltaHeads(1, 2, 4, 4, 3), local_layers=(True, False))
    slm, params = with_llm(*toy_slm(), **changes)
    run = jax.jit(lambda batch: slm_lib.forward(slm, params, batch).hidden_BTD)
    batch = toy_batch(ROWS)
    packed = with_segments(slm, batch, rows=2)
    padded_encoder = {name: x for name, x in packed.items() if name != "encoder_segments"}
    counts = [flops.count(run, x) for x in (packed, padded_encoder, batch)]
    assert counts == sorted(counts) and len(set(counts)) == 3
    wanted, found = run(batch), run(packed)
    valid_BT = np.arange(wanted.shape[1])[None] <= batch["token_length"][:, None]
    np.testing.assert_allclose(found[valid_BT], wanted[valid_BT], atol=1e-5)


def test_an_encoder_that_pools_and_reads_silence_is_packed():
    """Qwen2-Audio's: an odd number of positions leaves one over."""
    config = dataclasses.replace(toy_slm()[0].encoder.config, pool=2, reads_padding=True)
    encoder, mel_length_B = encoders.make(config), np.array([40, 22, 30, 0])
    mel_BFM = np.random.default_rng(0).normal(size=(4, 40, config.num_mels)).astype(np.float32)
    params = encoder.init(jax.random.key(0), mel_BFM, mel_length_B)
    segments = packing.segments(encoders.packed_length(config)(mel_length_B), 2, 33)
    wanted = encoder.apply(params, mel_BFM, mel_length_B)
    found = encoder.apply(params, mel_BFM, mel_length_B, segments)
    np.testing.assert_array_equal(wanted[1], [10, 5, 7, 0])
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    np.testing.assert_array_equal(found[1], wanted[1])


@pytest.fixture(scope="module")
def plan():
    """Two buckets, of 6 batches of 8 and of 3 of 4, in an order of their own; and lengths."""
    rng = np.random.default_rng(0)
    bucket_S = np.repeat([0, 1], [6, 3])
    size_S = np.array([8, 4])[bucket_S]
    count = size_S.sum()
    rows, speed = rng.permutation(count), rng.choice([0.9, 1.0], count)
    dealt = Plan(rows, speed, rows < 5, bucket_S, np.cumsum(size_S) - size_S, size_S)
    length_N = np.where(np.arange(count) < 48, 40, 90) + rows % 17
    return dealt.in_order(rng.permutation(9)), length_N


def test_every_utterance_lies_in_one_place(plan):
    """No utterance leaves its bucket, none is lost, rows are about as full, and `Packed` takes
    every position where `segments` has it, and back."""
    dealt, length_N = plan
    length_of = dict(zip(dealt.rows.tolist(), length_N.tolist(), strict=True))
    # As many positions in the encoder as there are draws before: nothing that the dealing looks at.
    in_encoder_N = np.arange(len(length_N))
    packed = packing.pack(dealt, np.stack([length_N, in_encoder_N]), rows=2, accumulation=2)
    draws = lambda plan: sorted(zip(plan.rows, plan.speed, plan.repeated, strict=True))
    assert draws(packed) == draws(dealt)
    for step in range(9):
        batch = packed.batch(step)
        lengths = np.array([length_of[row] for row in batch.rows.tolist()])
        slots, in_encoder = batch.slots_SK[0]
        places = [dealt.rows.tolist().index(row) for row in batch.rows]
        assert in_encoder >= max(sum(places[0::2]), sum(places[1::2]))
        made = packing.segments(lengths, 2, slots, accumulation=2)
        # micro-batch m has rows m, m + 2, ...; packed row m holds them, one behind the other
        for m, row in enumerate(made):
            wanted = np.repeat(np.arange(len(lengths[m::2])), lengths[m::2])
            np.testing.assert_array_equal(row[row < len(lengths[m::2])], wanted)
        assert (made == len(lengths) // 2).mean() < 0.1
        assert slots == packed.slots_SK[packed.bucket_S == batch.bucket_S[0]][0, 0]
    of_part = np.concatenate([lengths[0::2], lengths[1::2]])
    x_BL = 1 + np.arange(len(lengths) * 110.0).reshape(-1, 110)
    where = packing.packed(jnp.asarray(made), len(lengths), 110)
    back_BL = packing.unpack_rows(packing.pack_rows(x_BL, where), where)
    np.testing.assert_array_equal(back_BL, x_BL * (np.arange(110)[None] < of_part[:, None]))


def test_any_hosts_and_restarts_see_the_same(manifest):
    """And any number of packed rows the same utterances at each step."""
    utterances = sources.read_manifest(manifest)
    tokenizer = types.SimpleNamespace(encode=lambda text: [1] * len(text.split()))
    frames_to_positions = lambda frames: 3 + -(-frames // 8)

    def batches(unit=4, accumulation=2, **changes):
        options = dict(batch_size=8, seed=3, num_steps=6, packed=True, unit=unit, **changes)
        options |= dict(accumulation=accumulation, positions_of=frames_to_positions)
        options["encoder_positions_of"] = lambda frames: -(-frames // 2)
        return list(
            pipeline.train_batches(utterances, tokenizer, config_lib.default().data, **options)
        )

    whole = batches()
    shares = [batches(host_index=host, host_count=2) for host in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([p[key] for p in parts]))
    for batch, again in zip(whole[4:], batches(start_step=4), strict=True):
        assert all(np.array_equal(batch[key], again[key]) for key in batch)
    for batch, other in zip(whole, batches(unit=1, accumulation=1), strict=True):
        assert sorted(batch["index"]) == sorted(other["index"])
        for name in ("segments", "encoder_segments"):
            assert len(batch[name]) == 4 and len(other[name]) == 1


def test_a_packed_run_goes_on_as_if_nothing_had_been(manifest, tmp_path, capsys):
    """Twelve utterances, 16 a step: 8 packed rows of two, for 8 devices."""
    changes = dict(num_steps=4, checkpoint_every=2, batch_size=16, otreg__weight=0.0, packing=True)
    config = tone_config(manifest, **changes)
    train.train(config, tmp_path)
    wanted = metrics_of(tmp_path)
    assert "of the LLM's positions" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    train.train(config, tmp_path)
    assert metrics_of(tmp_path) == wanted
