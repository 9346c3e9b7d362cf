"""LoRA between PEFT and here, both ways, on a tiny random Llama."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from otreg_jax import pretrained
from otreg_jax.models import lora

TOKENS = np.arange(12).reshape(2, 6) % 11
MODULES = ["q_proj", "v_proj", "down_proj"]
PATTERN = r"llm/layers/(attn/[qv]|mlp/down)/kernel"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    llm, params = pretrained.load_llm(folder)
    return folder, jax.jit(llm.apply), llm, params


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def with_lora(params, rank, key=0):
    return lora.add({"llm": params}, PATTERN, rank, jax.random.key(key))["llm"]


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
    draw = lambda path, x: x + 0.3 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    adapted = jax.tree_util.tree_map_with_path(
        lambda path, x: draw(path, x) if path[-1].key in lora.PAIR else x, with_lora(params, 3)
    )
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
    with pytest.raises(ValueError, match="pairs of one rank"):
        pretrained.save_lora(tmp_path / "none", llm.config, base[3])
