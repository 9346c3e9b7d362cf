"""LoRA: what it touches, that it starts as nothing, that merging gives the same logits."""

import ast
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from toy_run import make_run

from otreg_jax.models import lora
from otreg_jax.models.llm import LLM, LLMConfig
from otreg_jax.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig

CONFIG = LLMConfig(
    vocab_size=40,
    embed_dim=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    tied_head=False,
)
TOKENS_BL = jax.random.randint(jax.random.key(1), (2, 7), 0, 40)
PATTERN = r"layers/(attn/[qv]|mlp/down)/kernel|head/kernel"


@pytest.fixture(scope="module")
def llm():
    model = LLM(CONFIG)
    return jax.jit(model.apply), jax.jit(model.init)(jax.random.key(0), TOKENS_BL)["params"]


def _trained(params):
    """Params whose pairs are no longer zero."""
    flat = traverse_util.flatten_dict(params)
    for path in flat:
        if path[-1] == "lora_b":
            flat[path] = 0.3 * jax.random.normal(jax.random.key(len(path[-2])), flat[path].shape)
    return traverse_util.unflatten_dict(flat)


def test_starts_as_no_change_beside_the_chosen_kernels_only(llm):
    apply, params = llm
    adapted = lora.add(params, PATTERN, rank=3, key=jax.random.key(2))
    new = set(traverse_util.flatten_dict(adapted, sep="/"))
    new -= set(traverse_util.flatten_dict(params, sep="/"))
    parents = ("layers/attn/q", "layers/attn/v", "layers/mlp/down", "head")
    assert new == {f"{parent}/{leaf}" for parent in parents for leaf in ("lora_a", "lora_b")}
    assert adapted["layers"]["mlp"]["down"]["lora_a"].shape == (2, 32, 3)
    np.testing.assert_array_equal(
        apply({"params": adapted}, TOKENS_BL), apply({"params": params}, TOKENS_BL)
    )
    stripped = lora.strip(_trained(adapted))
    jax.tree.map(np.testing.assert_array_equal, stripped, params)


def test_merging_gives_the_same_logits(llm):
    apply, params = llm
    adapted = _trained(lora.add(params, PATTERN, rank=3, key=jax.random.key(2)))
    plain = apply({"params": params}, TOKENS_BL)
    with_pairs = apply({"params": adapted}, TOKENS_BL)
    merged = lora.merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert jnp.abs(with_pairs - plain).max() > 0.1
    np.testing.assert_allclose(apply({"params": merged}, TOKENS_BL), with_pairs, atol=1e-5)


def test_adapts_and_merges_the_speech_encoder(llm):
    config = SpeechEncoderConfig(
        embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, num_mels=5, max_positions=20
    )
    encoder = SpeechEncoder(config)
    mel, length = jax.random.normal(jax.random.key(0), (1, 30, 5)), jnp.array([30])
    params = jax.jit(encoder.init)(jax.random.key(0), mel, length)["params"]
    adapted = lora.add({"encoder": params}, r"encoder/layers/.*/kernel", 2, jax.random.key(1))
    adapted = _trained(adapted)
    apply = jax.jit(encoder.apply)
    plain, _ = apply({"params": params}, mel, length)
    with_pairs, _ = apply({"params": adapted["encoder"]}, mel, length)
    merged, _ = apply({"params": lora.merge(adapted)["encoder"]}, mel, length)
    assert jnp.abs(with_pairs - plain).max() > 0.1
    np.testing.assert_allclose(merged, with_pairs, atol=1e-5)


def test_merging_into_a_bfloat16_kernel_loses_nothing_until_it_is_rounded(llm):
    apply, params = llm
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    adapted = _trained(lora.add(half, PATTERN, rank=3, key=jax.random.key(2)))
    assert adapted["head"]["lora_a"].dtype == jnp.float32
    merged = lora.merge(adapted)
    assert merged["head"]["kernel"].dtype == jnp.float32
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapted)
    with_pairs = apply({"params": exact}, TOKENS_BL)
    np.testing.assert_allclose(apply({"params": merged}, TOKENS_BL), with_pairs, atol=1e-5)

    # Against the definition, on one flat vector of all kernels.
    assert lora.rounded_away(adapted, "float32") == 0 == lora.rounded_away(params, "bfloat16")
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(float)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), merged)
    change = flat(merged) - flat(half)
    wanted = np.linalg.norm(flat(rounded) - flat(merged)) / np.linalg.norm(change)
    assert 1e-4 < wanted < 0.1
    assert lora.rounded_away(adapted, "bfloat16") == pytest.approx(wanted, rel=1e-4)


def test_the_draw_of_a_pair_does_not_depend_on_the_others(llm):
    _, params = llm
    few = lora.add(params, r"layers/attn/q/kernel", 3, jax.random.key(2))
    many = lora.add(params, PATTERN, 3, jax.random.key(2))
    np.testing.assert_array_equal(
        few["layers"]["attn"]["q"]["lora_a"], many["layers"]["attn"]["q"]["lora_a"]
    )


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("layers/attn/query/kernel", "no parameter matches 'layers/attn/query/kernel'"),
        (".*scale", "matches what is no Dense kernel: .*norm/scale"),
        ("embed/embedding", "no Dense kernel: embed/embedding"),
    ],
)
def test_patterns_that_cannot_be_adapted_are_refused(llm, pattern, message):
    with pytest.raises(ValueError, match=message):
        lora.add(llm[1], pattern, 3, jax.random.key(2))


def test_checkpoints_of_a_frozen_base_hold_what_is_trained_alone(tmp_path):
    run = make_run(
        tmp_path / "run",
        lora__pattern="llm/layers/attn/[qv]/kernel",
        freeze=r"^(encoder|llm)/(?!.*/lora_[ab]$)",
    )
    stored = json.loads((run / "checkpoints/3/state/_METADATA").read_text())["tree_metadata"]
    keys = ["/".join(map(str, ast.literal_eval(key))) for key in stored]
    pairs = {f"llm/layers/attn/{name}/lora_{side}" for name in "qv" for side in "ab"}
    adapter = {f"adapter/{name}/{leaf}" for name in ("in", "out") for leaf in ("kernel", "bias")}
    found = [re.search(r"(llm|encoder|adapter|ctc)/.*", key) for key in keys]
    assert {match[0] for match in found if match} == pairs | adapter
    assert sum(key.startswith("params/") for key in keys) == len(pairs | adapter)
