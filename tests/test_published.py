"""Models as they are published: their config.json is read as transformers reads it, and shrunk
models of the same keys compute the same."""

import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from otreg_jax import pretrained
from otreg_jax.pretrained import checks, configs, encoders

SHRUNK = dict(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
)
EYE = dict(
    hidden_size=8,
    image_size=28,
    intermediate_size=8,
    model_type="siglip_vision_model",
    num_attention_heads=2,
    num_hidden_layers=1,
    patch_size=14,
    vision_use_head=False,
)


def shrunk(raw: dict) -> dict:
    """The same keys with sizes, windows and context made small."""
    if "text_config" in raw:
        text = shrunk(raw["text_config"]) | SHRUNK
        return raw | {"text_config": text, "vision_config": EYE, "image_token_index": 60}
    small = SHRUNK | {"sliding_window": 4, "max_window_layers": 2, "query_pre_attn_scalar": 24}
    small |= {"pad_token_id": 0, "layer_types": raw.get("layer_types", [])[3:6]}
    raw = raw | {key: value for key, value in small.items() if raw.get(key) is not None}
    if scaling := raw.get("rope_scaling"):
        short = {"original_max_position_embeddings": 16} if len(scaling) > 2 else {}
        raw["rope_scaling"] = scaling | short
    return raw


@pytest.mark.parametrize("name", published.CONFIGS)
def test_config_json_is_read_as_transformers_reads_it(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published.CONFIGS[name]))
    ours = pretrained.llm_config(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    assert ours.vocab_size == theirs.vocab_size
    assert (ours.embed_dim, ours.mlp_dim) == (theirs.hidden_size, theirs.intermediate_size)
    assert (ours.num_layers, ours.num_heads) == (
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
    )
    first = theirs.per_layer_config[0] if ours.wide else theirs
    assert ours.num_kv_heads == first.num_key_value_heads
    head_dim = getattr(first, "head_dim", None)
    assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.tied_head == theirs.tie_word_embeddings and ours.norm_eps == theirs.rms_norm_eps
    kinds = getattr(theirs, "layer_types", None)
    if kinds and len(set(kinds)) > 1:
        assert ours.local_layers == tuple(kind != "full_attention" for kind in kinds)
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    if ours.wide:
        global_layer = theirs.per_layer_config[kinds.index("full_attention")]
        assert ours.wide.head_dim == global_layer.head_dim
        assert ours.wide.num_kv_heads == global_layer.num_key_value_heads


@pytest.mark.parametrize(
    "name",
    [
        "SmolLM2-135M-Instruct",
        "Llama-3.2-1B-Instruct, fine-tuned",
        "Ministral-8B-Instruct-2410, own class",
        "gemma-2-2b-it",
        "gemma-3-270m",
        "gemma-3-4b-it",
    ],
)
def test_shrunk_models_compute_the_same(name, tmp_path):
    """From the published keys, not from those that transformers would save. (All of them agreed;
    these cover every key.)"""
    raw = shrunk(published.CONFIGS[name])
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    kind = getattr(transformers, raw["architectures"][0])
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokens = torch.randint(0, 60, (2, 23))
    with torch.no_grad():
        logits = model(tokens).logits.numpy()

    def ours():
        llm, params = pretrained.load_llm(tmp_path)
        return jax.jit(llm.apply)({"params": params}, jnp.asarray(tokens.numpy()))

    np.testing.assert_allclose(ours(), logits, atol=2e-4, rtol=0)
    if raw["model_type"] == "gemma3":  # the other name its LLM's tensors have had inside the whole
        old, new = "language_model.model.", "model.language_model."
        arrays = load_file(tmp_path / "model.safetensors")
        assert any(name.startswith(old) for name in arrays)
        renamed = {name.replace(old, new): array for name, array in arrays.items()}
        save_file(renamed, tmp_path / "model.safetensors")
        np.testing.assert_allclose(ours(), logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", configs.FAMILIES)
def test_every_key_transformers_computes_with_is_read_or_refused(family):
    module = inspect.getmodule(getattr(transformers, configs.ARCHITECTURES[family]))
    classes = {
        name: kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and inspect.getmodule(kind) is module
    }
    # Of a module that also has images and sounds the classes of text.
    others = re.compile("Vision|Audio|Multimodal|Clippable|Conditional|Classification|PreTrained")
    whole = {name.removesuffix("TextModel") for name in classes if name.endswith("TextModel")}
    others = [n for n in classes if others.search(n) or n.removesuffix("Model") in whole]
    source = "".join(inspect.getsource(classes[name]) for name in classes.keys() - set(others))
    read = set(re.findall(r"config\.([a-z]\w+)", source))
    module_only = {"get_text_config", "text_config", "vision_config", "image_token_id"}
    module_only |= {"mm_tokens_per_image", "use_cache"}  # of the model of text and images
    module_only |= {"kv_sharing_modes"}  # which follow from num_kv_shared_layers
    read -= module_only | checks._HARMLESS
    assert read <= set(configs.FAMILIES[family])
    # And a key that another family computes with is never passed over.
    computed = set().union(*configs.FAMILIES.values())
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    sizes |= {"num_attention_heads", "num_key_value_heads", "head_dim", "max_window_layers"}
    for key in computed - set(configs.FAMILIES[family]) - sizes:
        assert checks.refused_keys({key: 3}, ()), key


def test_keys_that_change_nothing_are_named_once(caplog):
    raw = published.CONFIGS["SmolLM2-135M-Instruct"]
    checks._warn_once.cache_clear()
    for _ in range(2):
        configs.llm_config(raw, "dir/config.json")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "dir/config.json (llama): passed over, nothing is computed from them: "
        "is_llama_config, transformers.js_config"
    )


@pytest.mark.parametrize(
    "key, value",
    [
        ("rope_interleaved", True),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("num_local_experts", 8),
        ("attn_logit_softcapping", 30.0),
        ("sliding_window", 512),
        ("layer_types", ["full_attention"] * 30),
        ("embedding_multiplier", 12.0),
        ("logits_scaling", 8.0),
        ("partial_rotary_factor", 0.5),
        ("use_qk_norm", True),
        ("no_rope_layers", [0, 1]),
        ("per_layer_config", {"1": {"head_dim": 8}}),
        ("linear_num_value_heads", 4),
        ("attention_k_eq_v", True),
    ],
)
def test_keys_that_change_the_computation_are_refused(key, value):
    raw = published.CONFIGS["SmolLM2-135M-Instruct"] | {key: value}
    with pytest.raises(ValueError, match=f"dir/config.json.*\n.*{key}"):
        configs.llm_config(raw, "dir/config.json")


BAD = ["512", None, [512], {}, True, -512, 0, 0.5, float("nan"), 1e9, 10**9, 10**18, 10**400]


@pytest.mark.parametrize("key", SHRUNK)
@pytest.mark.parametrize("bad", BAD, ids=[repr(bad)[:12] for bad in BAD])
def test_impossible_sizes_are_named_with_file_and_key(key, bad, tmp_path):
    raw = published.CONFIGS["Qwen3-0.6B"] | {key: bad}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if bad is None and key in ("head_dim", "num_key_value_heads"):  # null: their class's default
        assert pretrained.llm_config(tmp_path).num_heads == 16
        return
    with pytest.raises(ValueError, match=f"config.json.*\n  {key} is .*, not ") as error:
        pretrained.llm_config(tmp_path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("key", sorted(encoders._WHISPER.keys() - {"activation_function"}))
@pytest.mark.parametrize("bad", BAD, ids=[repr(bad)[:12] for bad in BAD])
def test_impossible_sizes_of_a_speech_encoder_are_named(key, bad):
    with pytest.raises(ValueError, match=f"config.json:\n  {key} is .*, not "):
        encoders.speech_encoder_config({"model_type": "whisper", key: bad})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=16 does not divide among 3 heads"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"hidden_act": ["silu"]}, "hidden_act is .*, not a string"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, not a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, not a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', not a list"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', not an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope: factor is '2', not a"),
        ({"model_type": ["qwen3"]}, "is not supported; llama"),
    ],
)
def test_impossible_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        configs.llm_config(published.CONFIGS["Qwen3-0.6B"] | changes)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gemma-4-31B-it", {"hidden_size_per_layer_input": 256}, "E2B, E4B.*not computed"),
        ("gemma-4-31B-it", {"num_kv_shared_layers": 20}, "num_kv_shared_layers=20"),
        ("gemma-4-31B-it", {"enable_moe_block": True}, "experts .*not computed"),
        ("gemma-4-31B-it", {"use_bidirectional_attention": "all"}, "only causal"),
        ("gemma-4-31B-it", {"per_layer_config": {"5": {"head_dim": 512}}}, "not of the same heads"),
        ("gemma-4-31B-it", {"num_global_key_value_heads": 5}, "does not divide among 5 heads"),
        ("Qwen3.5-0.8B", {"attn_output_gate": False}, "attn_output_gate"),
        ("Qwen3.5-0.8B", {"linear_num_key_heads": 5}, "linear_num_value_heads=16 does not divide"),
        ("Qwen3.5-0.8B", {"layer_types": ["sliding_attention"] * 24}, "'sliding_attention' is not"),
        ("Qwen3.5-0.8B", {"num_experts": 64}, "unknown key 'num_experts'"),
    ],
)
def test_what_is_not_computed_of_models_of_several_shapes_is_named(name, changes, message):
    raw = published.CONFIGS[name]
    raw = raw | {"text_config": raw["text_config"] | changes}
    with pytest.raises(ValueError, match=f"dir/config.json.*\n.*{message}"):
        configs.llm_config(raw, "dir/config.json")


def test_a_null_inside_rope_parameters_is_as_if_left_out():
    raw = published.CONFIGS["SmolLM2-135M-Instruct"] | {"rope_parameters": {"rope_theta": None}}
    assert configs.llm_config(raw).rope_theta == 100_000


@pytest.mark.parametrize("contents", ["[]", "null", "\xff", "[" * 100_000, "9" * 5000])
def test_files_that_are_no_object_are_named(contents, tmp_path):
    (tmp_path / "config.json").write_bytes(contents.encode("latin-1"))
    for read in (pretrained.llm_config, pretrained.speech_encoder_config):
        with pytest.raises(ValueError, match="config.json: (not valid JSON|is .*, not an object)"):
            read(tmp_path)
