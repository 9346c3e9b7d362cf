"""LoRA between PEFT and here, both ways, on a tiny random Llama."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from otreg_jax import pretrained
from otreg_jax.models import lora
from otreg_jax.models.block import LLMConfig, WideHeads
from otreg_jax.models.llm import LLM

TOKENS = np.arange(12).reshape(2, 6) % 11
MODULES = ["q_proj", "v_proj", "down_proj"]
PATTERN = r"llm/layers/(attn/[qv]|mlp/down)/kernel"
SHAPE = dict(
    vocab_size=11,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(folder)
    llm, params = pretrained.load_llm(folder)
    return folder, jax.jit(llm.apply), llm, params


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def with_lora(params, rank, key=0):
    return lora.add({"llm": params}, PATTERN, rank, jax.random.key(key))["llm"]


def moved(params):
    """Params whose pairs have changed, as if trained."""
    draw = lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: draw(x) if path[-1].key in lora.PAIR else x, params
    )


@pytest.mark.parametrize("stabilised", [False, True])
def test_what_peft_trained_gives_its_logits_here(stabilised, base, tmp_path):
    folder, apply, llm, params = base
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(
        r=3, lora_alpha=12, target_modules=MODULES, use_rslora=stabilised, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    tokens = torch.tensor(TOKENS)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)

    pairs = pretrained.load_lora(tmp_path, None, llm.config)
    adapted = pretrained.with_pairs(with_lora(params, 3), pairs, "here")
    logits = apply({"params": adapted}, TOKENS)
    np.testing.assert_allclose(logits, theirs(model), atol=1e-4, rtol=0)
    assert np.abs(logits - apply({"params": params}, TOKENS)).max() > 0.1

    for other, said in ((with_lora(params, 2), "lora.rank=3"), (params, "attn/q\\|layers/attn/v")):
        with pytest.raises(ValueError, match=said):
            pretrained.with_pairs(other, pairs, "here")


def test_what_was_trained_here_gives_its_logits_in_peft(base, tmp_path):
    folder, apply, llm, params = base
    adapted = moved(with_lora(params, 3))
    pretrained.save_lora(tmp_path, llm.config, adapted)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    logits = apply({"params": adapted}, TOKENS)
    np.testing.assert_allclose(theirs(model), logits, atol=1e-4, rtol=0)
    back = pretrained.load_lora(tmp_path, None, llm.config)
    again = pretrained.with_pairs(with_lora(params, 3, key=1), back, "here")
    jax.tree.map(np.testing.assert_array_equal, again, adapted)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "r is 0, not a whole number"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
    ],
)
def test_other_methods_and_bad_values_are_refused(change, message, base, tmp_path):
    llm = base[2]
    adapted = with_lora(base[3], 2)
    pretrained.save_lora(tmp_path, llm.config, adapted)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        pretrained.load_lora(tmp_path, None, llm.config)


def test_pairs_that_do_not_fit_the_model_are_listed(base, tmp_path):
    llm, adapted = base[2], with_lora(base[3], 2)
    pretrained.save_lora(tmp_path, llm.config, adapted)
    shallow = pretrained.llm_config(base[0])
    shallow = type(shallow)(**{**vars(shallow), "num_layers": 3})
    with pytest.raises(ValueError, match="layers/attn/q/lora_a: 2 of 3 layers have it"):
        pretrained.load_lora(tmp_path, None, shallow)
    with pytest.raises(ValueError, match="there are no low-rank pairs"):
        pretrained.save_lora(tmp_path / "none", llm.config, base[3])


def test_pairs_of_kernels_in_one_tensor_are_one_pair_in_peft(tmp_path):
    """Phi-3's q, k and v: written as one pair of three times the rank, read as a pair for each."""
    torch.manual_seed(0)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = transformers.Phi3Config(**SHAPE, **ids)
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path / "base")
    llm, params = pretrained.load_llm(tmp_path / "base")
    pattern = r"llm/layers/(attn/[qv]|mlp/down)/kernel"  # k has none
    adapted = moved(lora.add({"llm": params}, pattern, 2, jax.random.key(0))["llm"])
    apply = jax.jit(llm.apply)
    logits = apply({"params": adapted}, TOKENS)
    assert np.abs(logits - apply({"params": params}, TOKENS)).max() > 0.1
    pretrained.save_lora(tmp_path / "lora", llm.config, adapted)
    described = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert described["r"] == 4 and described["target_modules"] == ["down_proj", "qkv_proj"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    np.testing.assert_allclose(theirs(model), logits, atol=1e-4, rtol=0)

    pairs = pretrained.load_lora(tmp_path / "lora", None, llm.config)
    assert pairs["layers/attn/k/lora_b"].shape == (2, 4, 8)
    wide = lora.add(
        {"llm": params}, r"llm/layers/(attn/[qkv]|mlp/down)/kernel", 4, jax.random.key(0)
    )
    back = pretrained.with_pairs(wide["llm"], pairs, "here")
    np.testing.assert_allclose(apply({"params": back}, TOKENS), logits, atol=1e-5, rtol=0)


def test_pairs_of_layers_of_several_shapes_keep_the_numbers_of_their_layers(tmp_path):
    wide = WideHeads(head_dim=8, num_kv_heads=1, value_is_key=True)
    config = LLMConfig(11, 8, 3, 2, 1, 4, 8, family="gemma4_text", sliding_window=2, wide=wide)
    llm = LLM(dataclasses.replace(config, local_layers=(True, False, True)))
    params = jax.eval_shape(llm.init, jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    pattern = "llm/layers/(full|sliding)/attn/q/kernel"
    adapted = moved(lora.add({"llm": params}, pattern, 2, jax.random.key(0))["llm"])
    pretrained.save_lora(tmp_path, llm.config, adapted)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    for shape, index, number in (("sliding", 0, 0), ("full", 0, 1), ("sliding", 1, 2)):
        pair = adapted["layers"][shape]["attn"]["q"]["lora_a"][index]
        np.testing.assert_array_equal(stored[name.format(number)], pair.T)
    pairs = pretrained.load_lora(tmp_path, None, llm.config)
    jax.tree.map(
        np.testing.assert_array_equal, pretrained.with_pairs(adapted, pairs, "here"), adapted
    )
