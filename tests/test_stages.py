"""Stages: what each computes and trains, and that a run crosses their boundary exactly."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_batch, toy_config, toy_slm
from toy_run import metrics_of, tone_config, write_tones

from otreg_jax import config as config_lib
from otreg_jax import flops, losses, optim, stages, train, train_step
from otreg_jax.data import encoded
from otreg_jax.models import slm as slm_lib

ALIGN = {
    "start": 0,
    "ce": {"weight": 0.0},
    "ctc": {"weight": 1.0},
    "optim": {"learning_rate": 3e-3, "warmup_steps": 0},
    "train": "^(adapter|ctc)/",
}
SFT = {"start": 5, "optim": {"learning_rate": 1e-3}}


def two_stages(config):
    config.stages = {"align": ALIGN, "sft": SFT}
    return config


def step_of(config, stage):
    slm, params = toy_slm(ctc=True)
    trained, frozen = optim.split(params, config.freeze)
    optimizer = optim.make_optimizer(stage.config, stage.train)
    state = train_step.init_state(trained, optimizer)
    return (
        state,
        frozen,
        train_step.make_step(slm, stage.config, optimizer, state, stage.start, stage.train),
    )


def test_a_stage_replaces_what_it_names_and_keeps_the_rest():
    config = two_stages(toy_config(otreg__weight=0.5, optim__clip_norm=2.0))
    align, sft = stages.stages_of(config)
    assert (align.start, align.stop, align.config.num_steps) == (0, 5, 5)
    assert (sft.start, sft.stop, sft.config.num_steps) == (5, 20, 15)
    assert (align.config.ce.weight, align.config.ctc.weight) == (0.0, 1.0)
    assert (sft.config.ce.weight, sft.config.ctc.weight) == (1.0, 0.0)
    assert align.config.otreg.weight == sft.config.otreg.weight == 0.5
    assert align.config.optim.clip_norm == 2.0
    assert [stages.at((align, sft), step).name for step in (0, 4, 5, 19, 20)] == [
        "align",
        "align",
        "sft",
        "sft",
        "sft",
    ]


def test_a_stage_without_cross_entropy_runs_no_more_of_the_llm_than_its_losses_need():
    """By FLOPs, forward and backward: none of it at layer 0, one layer of two at layer 1."""
    config = two_stages(toy_config())
    batch = toy_batch(8)
    count = {}
    for name, change in {"layer0": {}, "layer1": {"layer": 1}, "ce": None}.items():
        stage = stages.stages_of(config)[0]
        if change is None:
            stage.config.ce.weight = 1.0
        else:
            stage.config.otreg.update({"weight": 1.0, **change})
        state, frozen, step = step_of(config, stage)
        count[name] = flops.count(step, state, frozen, batch)

    slm, params = toy_slm(ctc=True)
    speech = flops.count(
        lambda p: slm_lib.speech_embeddings(slm, p, batch["mel"], batch["mel_length"]), params
    )
    assert count["layer0"] < 4 * speech  # forward and backward of encoder and adapter, and losses
    assert count["layer0"] < count["layer1"] < 0.8 * count["ce"]


def test_a_stage_moves_only_what_it_trains():
    config = two_stages(toy_config(optim__weight_decay=0.1))
    align, sft = stages.stages_of(config)
    state, frozen, step = step_of(config, align)
    before = jax.device_get(state.params)
    state, metrics = step(state, frozen, toy_batch(8))
    moved = {
        path
        for path, x in optim.flat_paths(jax.device_get(state.params)).items()
        if np.any(x != optim.flat_paths(before)[path])
    }
    assert moved and all(path.startswith(("adapter/", "ctc/")) for path in moved)
    assert {"loss", "ctc"} <= metrics.keys() and "ce" not in metrics
    assert sft.train == ""


def test_schedules_count_from_the_start_of_a_stage():
    config = two_stages(toy_config(otreg__weight=2.0, otreg__start_step=3, otreg__ramp_steps=2))
    _, sft = stages.stages_of(config)
    weight = losses.make_schedules(sft.config, sft.start).otreg_weight
    assert [float(weight(step)) for step in (5, 8, 9, 10, 15)] == [0.0, 0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "stage, said",
    [
        ({"start": 3}, "must start at 0"),
        ({"start": 20}, "before num_steps=20"),
        ({"start": 0, "lora": {"rank": 4}}, "stages.only.lora.rank=4: no such setting"),
        ({"start": 0, "ctc": {"wieght": 1.0}}, "stages.only.ctc.wieght=1.0: no such setting"),
        ({"start": 0, "ctc": {"weight": -1.0}}, "stages.only.ctc.weight=-1.0: must be"),
        ({"start": -1}, "stages.only.start=-1: must be"),
        ({"start": 0, "train": "("}, "stages.only.train='(': must be"),
        ({"start": 0, "optim": {"warmup_steps": 21}}, "stages.only (20 steps): optim.warmup_steps"),
        ({"ctc": {"weight": 1.0}}, "stages.only lacks start"),
    ],
)
def test_what_is_wrong_with_a_stage_is_said(stage, said):
    config = toy_config(data__train="train.jsonl")
    config.stages = {"only": stage}
    assert any(said in problem for problem in config_lib.problems(config))


# Real tables: rows lie in a cone (mean cosine 0.44 in SmolLM2's), are not centred, differ in norm.
def real_like_table(rows: int, width: int):
    common, key = jax.random.normal(jax.random.key(1), (width,)), jax.random.key(2)
    own = jax.random.normal(key, (rows, width))
    norm = jnp.exp(0.3 * jax.random.normal(jax.random.key(3), (rows, 1)))
    return 0.2 * norm * (own + 0.88 * common)


def test_ctc_over_all_rows_of_a_real_like_table_hardly_moves_and_over_those_in_use_learns():
    """49,152 classes within a cone: no output, however good, has a low loss."""
    table_VD = real_like_table(49_152, 64)
    cosines = np.corrcoef(np.asarray(table_VD[:200]))[np.triu_indices(200, 1)]
    assert 0.3 < np.mean(cosines) < 0.6
    rng = np.random.default_rng(0)
    used_C = np.sort(rng.choice(len(table_VD), 300, replace=False))
    tokens_BT = jnp.asarray(rng.choice(used_C, (2, 6)))
    mask_BT = jnp.ones(tokens_BT.shape, bool)
    length_B = jnp.array([13, 13])

    def best(ctc_params):
        """The loss of perfect outputs: each token's own row, blanks between."""
        blank = ctc_params["blank"] / jnp.linalg.norm(ctc_params["blank"])
        speech_BSD = jnp.tile(blank, (2, 13, 1)).at[:, 1::2].set(table_VD[tokens_BT])
        loss, left_out = losses.ctc_loss(
            speech_BSD, length_B, tokens_BT, mask_BT, table_VD, ctc_params
        )
        assert left_out == 0
        return float(loss)

    everything = best(losses.init_ctc(jax.random.key(0), 64, 10.0, len(table_VD)))
    in_use = best(losses.init_ctc(jax.random.key(0), 64, 10.0, len(table_VD), used_C))
    assert everything > 5.5  # 8 nats of it when the blank began as one class among all
    assert in_use < 0.5 * everything


def test_the_blank_begins_as_probable_as_all_tokens_together():
    """Else turning every output towards it is what pays first, and some adapters stay there."""
    table_VD, key = real_like_table(3000, 64), jax.random.key(1)
    speech_BSD = jax.random.normal(key, (4, 50, 64))
    for classes_C in (None, np.arange(0, 3000, 7)):
        head = losses.init_ctc(key, 64, 10.0, len(table_VD), classes_C)
        _, heard_BS = losses.ctc_reading(speech_BSD, np.ones((4, 50), bool), table_VD, head)
        assert 0.3 < np.median(heard_BS) < 0.7
        as_one_class = head | {"blank_bias": jnp.float32(0.0)}
        _, heard_BS = losses.ctc_reading(speech_BSD, np.ones((4, 50), bool), table_VD, as_one_class)
        assert np.median(heard_BS) > 0.99


def test_ctc_over_classes_in_use_is_ctc_over_a_table_of_them():
    table_VD = real_like_table(40, 8)
    used_C = jnp.array([3, 5, 8, 21, 30])
    tokens_BT = jnp.array([[5, 30, 30, 3], [8, 21, 5, 7]])  # 7 is no class
    mask_BT = jnp.array([[True] * 4, [True] * 4])
    speech_BSD = jax.random.normal(jax.random.key(0), (2, 9, 8))
    head = losses.init_ctc(jax.random.key(4), 8, 5.0, 40, used_C)
    length_B = jnp.array([9, 9])
    loss, left_out = losses.ctc_loss(speech_BSD, length_B, tokens_BT, mask_BT, table_VD, head)
    assert left_out == 1
    plain = {name: head[name] for name in ("blank", "blank_bias", "log_scale")}
    among_used_BT = jnp.array([[1, 4, 4, 0]])
    wanted, _ = losses.ctc_loss(
        speech_BSD[:1], length_B[:1], among_used_BT, mask_BT[:1], table_VD[used_C], plain
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def staged_config(manifest, **changes):
    config = tone_config(
        manifest,
        freeze="^(encoder|llm)/",
        data__augment__freq_masks=0,
        data__num_buckets=1,
        ctc__classes="used",
        adapter__norm="table",
        keep_checkpoints=3,
        otreg__weight=0.0,
        **changes,
    )
    config.stages = {"align": ALIGN, "sft": {**SFT, "start": 4}}
    return config


def test_a_run_crosses_the_boundary_of_its_stages_and_resumes_on_either_side_to_the_bit(tmp_path):
    config = staged_config(write_tones(tmp_path))
    train.train(config, tmp_path / "straight")
    wanted = metrics_of(tmp_path / "straight")
    assert [("ce" in wanted[step], "ctc" in wanted[step]) for step in (4, 5)] == [
        (False, True),
        (True, False),
    ]
    assert wanted[5]["learning_rate"] < wanted[4]["learning_rate"]  # the warm-up begins anew
    for kept in (4, 8):
        workdir = tmp_path / f"from{kept}"
        shutil.copytree(tmp_path / "straight", workdir)
        for step in (8, 12):
            if step > kept:
                shutil.rmtree(workdir / "checkpoints" / str(step))
        train.train(config, workdir)
        assert metrics_of(workdir) == wanted


def test_kept_encoder_outputs_train_as_the_encoder_does_and_are_computed_once(tmp_path):
    manifest = write_tones(tmp_path)
    lines = manifest.read_text().splitlines()
    again = json.loads(lines[5]) | {"id": "again", "text": "sol"}  # of the same recording
    manifest.write_text("\n".join([json.dumps(again), *lines]))
    train.train(staged_config(manifest), tmp_path / "plain")
    config = staged_config(manifest, encoder__keep=True)
    train.train(config, tmp_path / "kept")
    plain, kept = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "kept")
    for name, value in plain[1].items():
        np.testing.assert_allclose(kept[1][name], value, rtol=1e-5, err_msg=name)
    for step, line in plain.items():  # Adam makes rounding larger, step by step
        np.testing.assert_allclose(kept[step]["loss"], line["loss"], rtol=1e-3)
    folder = tmp_path / "kept" / "encoded"
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {path.suffix for path in files} == {".npy", ".json"}
    assert sum(len(json.loads(p.read_text())["frames"]) for p in folder.glob("*.json")) == 12
    shutil.rmtree(tmp_path / "kept" / "checkpoints")
    train.train(config, tmp_path / "kept")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    config.encoder.mlp_dim = 48  # another encoder: what is kept is not its
    config.num_steps, config.stages = 3, {"align": ALIGN}
    train.train(config, tmp_path / "other")
    assert metrics_of(tmp_path / "other")[1]["ctc"] != kept[1]["ctc"]


def test_runs_side_by_side_may_keep_the_same_shard(tmp_path, monkeypatch):
    found = [(4, np.full((4, 2), 0.5, np.float32)), None, (2, np.ones((2, 2), np.float32))]
    write = lambda: encoded._write_shard(tmp_path / "shard", found, positions=lambda n: n)
    save = np.save

    def save_while_another_process_writes(path, array):
        save(path, array)
        monkeypatch.setattr(np, "save", save)
        with monkeypatch.context() as other:
            other.setattr(encoded.os, "getpid", lambda: -1)
            write()

    monkeypatch.setattr(np, "save", save_while_another_process_writes)
    write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard.json", "shard.npy"]
    assert np.load(tmp_path / "shard.npy").shape == (6, 2)


def test_an_encoder_that_is_trained_or_fed_at_random_is_not_kept(tmp_path):
    manifest = write_tones(tmp_path)
    with pytest.raises(ValueError, match="encoder.keep=True: the encoder is trained"):
        plain = {"data__augment__freq_masks": 0}
        train.train(tone_config(manifest, encoder__keep=True, **plain), tmp_path)
    with pytest.raises(ValueError, match="encoder.keep=True.*cannot be augmented"):
        train.train(tone_config(manifest, encoder__keep=True), tmp_path)
