"""What a parameter's path decides: what trains, in which dtype, what decays, what OTReg aims at."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import toy_batch, toy_config, toy_slm

from otreg_jax import build, losses, optim, pretrained, train_step
from otreg_jax.data import tokenization
from otreg_jax.models import lora
from otreg_jax.models import slm as slm_lib

PATTERN = "llm/layers/attn/[qv]/kernel"


@functools.cache
def adapted():
    slm, params = toy_slm(ctc=True)
    return slm, lora.add(params, PATTERN, 2, jax.random.key(1))


def test_weight_decay_pulls_on_matrices_alone():
    """Every other leaf has two dimensions too, once it is stacked over the layers."""
    _, params = adapted()
    params["adapter"] = params["adapter"] | {"queries": jnp.ones((1, 16))}
    params = jax.tree.map(lambda x: x + 1.0, params)
    config = toy_config(optim__weight_decay=0.1, optim__warmup_steps=0, optim__ema_decay=0.9)
    optimizer = optim.make_optimizer(config)
    state = optimizer.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, after = jax.jit(optimizer.update)(zero, state, params)
    for path, update in optim.flat_paths(updates).items():
        is_matrix = path.rpartition("/")[2] in ("kernel", "lora_a", "lora_b")
        assert np.any(update) == is_matrix, path
    # A checkpoint made when all of two dimensions decayed still restores.
    c, by_size = config.optim, lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
    adamw = optax.adamw(optim.learning_rate(config), c.b1, c.b2, weight_decay=0.1, mask=by_size)
    clip = optax.clip_by_global_norm(c.clip_norm)
    ema = optim.average_weights(c.ema_decay)
    before = optax.chain(clip, adamw, optax.identity(), ema).init(params)
    assert jax.tree.structure(before) == jax.tree.structure(after)


@pytest.mark.parametrize(
    "changes, problems",
    [
        (dict(freeze="^llm/embedding/"), ["matches no parameter; there are e.g. adapter/"]),
        (dict(freeze="."), ["matches every parameter", "matches low-rank pairs"]),
        (dict(freeze="^llm/"), [r"never train: .*attn/q/lora_a.*\(4 in all\); .*\(\?!"]),
        (dict(freeze="^encoder/"), [r"does not match kernels .*llm/layers/attn/q/kernel"]),
    ],
    ids=str,
)
def test_freezing_that_cannot_be_meant_is_refused(changes, problems):
    with pytest.raises(ValueError) as error:
        build.split(adapted()[1], toy_config(lora__pattern=PATTERN, **changes))
    for problem in problems:
        assert re.search(problem, str(error.value))


@pytest.mark.parametrize("freeze", ["^llm/(embed|layers|norm|head)/", "^llm/layers/(?!mlp)"])
def test_only_what_trains_is_loaded_in_float32(tmp_path, monkeypatch, freeze):
    texts = ["do re", "mi fa"]
    tokenizer = tokenization.train_sentencepiece(texts, tmp_path, 12, model_type="word")
    config = toy_config(compute_dtype="bfloat16", freeze=freeze)
    config.llm.update(embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)
    config.encoder.update(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32)
    slm, params = build.build(config, tokenizer)
    pretrained.save_llm(tmp_path / "llm", slm.llm, params["llm"], tokenizer)
    config.llm.path = str(tmp_path / "llm")
    loaded = []
    monkeypatch.setattr(build, "init_params", lambda slm, config, parts, *_: loaded.append(parts))
    build.build(config, tokenizer, config.llm.path)
    is_frozen = functools.partial(re.search, freeze)
    flat = optim.flat_paths(loaded[0])
    assert flat.keys() == {path for path in optim.flat_paths(params) if path.startswith("llm/")}
    for path, x in flat.items():
        assert x.dtype == (jnp.bfloat16 if is_frozen(path) else jnp.float32), path


def test_full_fine_tuning_does_not_move_what_otreg_aims_at():
    slm, params = toy_slm()
    config = toy_config(
        freeze="^encoder/",
        otreg__weight=1.0,
        otreg__layer=1,
        llm__pretrain__num_steps=1,
        optim__learning_rate=3e-2,
        optim__warmup_steps=0,
    )
    trained, frozen = build.split(params, config)
    frozen |= build.text_target(trained, config)
    batch = toy_batch(4)
    aim = jax.jit(functools.partial(slm_lib.text_embeddings, slm), static_argnums=2)
    start = {layer: aim(params, batch["tokens"], layer) for layer in (0, 1)}
    optimizer = optim.make_optimizer(config)
    state = train_step.init_state(trained, optimizer)
    step = functools.partial(
        train_step.train_step,
        slm=slm,
        config=config,
        optimizer=optimizer,
        schedules=losses.make_schedules(config),
    )
    step = jax.jit(step, donate_argnums=0)
    for _ in range(3):
        state, _ = step(state, frozen, batch)
    for layer in (0, 1):
        now = optim.merge(state.params, frozen)
        np.testing.assert_array_equal(aim(now, batch["tokens"], layer), start[layer])
        now.pop("target")
        assert np.abs(aim(now, batch["tokens"], layer) - start[layer]).max() > 1e-2


def test_the_target_holds_what_trains_and_lies_below():
    _, params = adapted()
    of = lambda freeze, **changes: optim.flat_paths(
        build.text_target(
            optim.split(params, freeze)[0],
            toy_config(compute_dtype="bfloat16", **{"otreg__weight": 1.0} | changes),
        )
    )
    pretrained_llm = dict(llm__pretrain__num_steps=1)
    whole = of("^encoder/", otreg__layer=1, **pretrained_llm)
    assert all(x.dtype == jnp.bfloat16 for x in whole.values())
    table = whole.pop("target/llm/embed/embedding")
    assert table.shape == (24, 16) and all(len(x) == 1 for x in whole.values())
    layers = [path for path in optim.flat_paths(params) if path.startswith("llm/layers/")]
    assert whole.keys() == {f"target/{path}" for path in layers if "lora" not in path}
    assert of("^encoder/", **pretrained_llm).keys() == {"target/llm/embed/embedding"}  # layer 0
    assert not of("^(encoder|llm)/", otreg__layer=1, **pretrained_llm)  # frozen: it stays by itself
    assert not of("^encoder/", otreg__layer=1)  # from scratch: no start worth keeping
    assert not of("^encoder/", otreg__weight=0.0, **pretrained_llm)
