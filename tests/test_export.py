"""Export: what is written opens again, on both sides, and gives the same logits."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file
from toy_run import make_run

from otreg_jax import build, export, pretrained
from otreg_jax import config as config_lib
from otreg_jax.data import chat, text, tokenization
from otreg_jax.models import lora


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with LoRA on the LLM and the encoder, as if trained."""
    config = config_lib.default()
    config.encoder.update(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_positions=30)
    config.encoder.strides = (1, 2)
    config.llm.update(embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)
    config.adapter.hidden_dim = 16
    tokenizer = tokenization.train_sentencepiece(
        ["turn on", "turn off"], tmp_path_factory.mktemp("sp") / "t", 30, model_type="word"
    )
    slm, params = build.build(config, tokenizer)
    pattern = r"llm/layers/attn/[qv]/kernel|encoder/layers/mlp/up/kernel"
    params = lora.add(params, pattern, 2, jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.3 if path[-1].key == "lora_b" else x, params
    )
    return build.Run(config, slm, params, tokenizer, 7, None)


def test_export_opens_and_gives_the_same_outputs(run, tmp_path):
    export.export(run, tmp_path)
    tokens = np.arange(5)[None] % run.tokenizer.vocab_size
    logits = jax.jit(run.slm.llm.apply)({"params": run.params["llm"]}, tokens)
    without = jax.jit(run.slm.llm.apply)({"params": lora.strip(run.params["llm"])}, tokens)
    assert jnp.abs(logits - without).max() > 1e-2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits, logits, atol=1e-4)
    assert theirs.config.eos_token_id == run.tokenizer.eos_id
    assert json.loads((tmp_path / "llm" / export.GENERATION).read_text()) == {
        "bos_token_id": run.tokenizer.bos_id,
        "eos_token_id": run.tokenizer.eos_id,
    }
    assert tokenization.load_tokenizer(tmp_path / "llm").fingerprint == run.tokenizer.fingerprint

    mel_BFM = np.random.default_rng(0).normal(size=(1, 60, run.slm.encoder.config.num_mels))
    mel_BFM = mel_BFM.astype(np.float32)
    features, _ = jax.jit(run.slm.encoder.apply)(
        {"params": run.params["encoder"]}, mel_BFM, np.array([60])
    )
    whisper = transformers.models.whisper.modeling_whisper.WhisperEncoder
    theirs = whisper.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        hidden = theirs(torch.tensor(mel_BFM.transpose(0, 2, 1))).last_hidden_state
    np.testing.assert_allclose(hidden, features, atol=1e-4)

    adapter = load_file(tmp_path / "adapter.safetensors")
    np.testing.assert_array_equal(
        adapter["adapter/out/kernel"], run.params["adapter"]["out"]["kernel"]
    )
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["step"] == 7 and description["adapter"]["kind"] == "mlp"
    assert description["prompt"]["eos"] == run.tokenizer.eos_id


def test_a_chat_model_keeps_its_template_and_its_end_of_turn(run, tmp_path, capsys):
    """What `transformers` needs to converse with the exported LLM as the base does."""
    base = tmp_path / "base"
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "turn": 1}, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>", "</s>", "<end>"])
    base.mkdir()
    made.save(str(base / "tokenizer.json"))
    config = {"eos_token": "</s>", "bos_token": "<s>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    (base / chat.FILE).write_text(template)
    kept = {"bos_token_id": 2, "eos_token_id": [3, 9], "temperature": 0.7}
    (base / export.GENERATION).write_text(json.dumps(kept))

    c = run.config.copy_and_resolve_references()
    c.llm.path, c.lora.pattern = str(base), "llm/"
    tokenizer = tokenization.load_tokenizer(base)
    slm = run.slm._replace(prompt=text.build_prompt(tokenizer, "chat:{speech}"))
    half = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key in lora.PAIR else x.astype(jnp.bfloat16), run.params
    )
    chatty = run._replace(config=c, tokenizer=tokenizer, slm=slm, params=half)
    lost = export.export(chatty, tmp_path / "out", "bfloat16")
    assert lost == pytest.approx(lora.rounded_away(half, "bfloat16")) and 0 < lost < 0.1
    llm = tmp_path / "out" / "llm"
    end = tokenizer.token_id("<end>")
    assert json.loads((llm / export.GENERATION).read_text()) == kept | {"eos_token_id": [end, 3, 9]}
    theirs = transformers.AutoTokenizer.from_pretrained(llm)
    assert theirs.chat_template == template
    assert load_file(llm / "model.safetensors")["model.norm.weight"].dtype == jnp.bfloat16
    # Without a dtype nothing is lost: the LLM and the encoder have pairs.
    assert export.export(chatty, tmp_path / "exact") == 0
    _, params = pretrained.load_llm(tmp_path / "exact" / "llm")
    jax.tree.map(np.testing.assert_array_equal, params, lora.merge(half["llm"]))
    assert json.loads((tmp_path / "exact/llm/config.json").read_text())["torch_dtype"] == "float32"


def test_export_never_overwrites(run, tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        export.export(run, tmp_path)


def test_the_command_exports_a_run_directory(tmp_path, capsys):
    """What `load_run` gives computes on a mesh, which no config.json can hold."""
    workdir = make_run(tmp_path / "run")
    export.cli([f"--workdir={workdir}", f"--out={tmp_path / 'out'}"])
    assert f"wrote {tmp_path / 'out'}/llm" in capsys.readouterr().out
    run = build.load_run(workdir)
    llm, params = pretrained.load_llm(tmp_path / "out" / "llm")
    jax.tree.map(np.testing.assert_array_equal, params, run.params["llm"])
    assert llm.config == dataclasses.replace(run.slm.llm.config, attention=llm.config.attention)


def test_the_command_explains_a_missing_run(tmp_path, capsys):
    assert export.cli([f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"]) == 1
    assert re.match("error: .*no run here", capsys.readouterr().err)
