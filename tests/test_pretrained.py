"""Strict loading: what does not fit is refused with everything named; shardings; many files."""

import dataclasses
import fnmatch
import json
import math

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from otreg_jax import pretrained
from otreg_jax.models import lora
from otreg_jax.models.llm import LLM, LLMConfig
from otreg_jax.models.rope import RopeScaling
from otreg_jax.models.speech_encoder import SpeechEncoder, SpeechEncoderConfig
from otreg_jax.pretrained import configs, load, save

CONFIG = LLMConfig(
    vocab_size=24,
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    tied_head=False,
)


@pytest.fixture(scope="module")
def llm():
    model = LLM(CONFIG)
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(0), tokens)["params"]


@pytest.fixture
def directory(llm, tmp_path):
    pretrained.save_llm(tmp_path, *llm)
    return tmp_path


def _edit(directory, change):
    """Rewrites the weights after `change` of the dict of arrays."""
    arrays = load_file(directory / "model.safetensors")
    change(arrays)
    save_file(arrays, directory / "model.safetensors")


def test_every_tensor_that_does_not_fit_is_listed(directory):
    def spoil(arrays):
        del arrays["model.norm.weight"]
        arrays["model.extra.weight"] = np.zeros(3, np.float32)
        arrays["model.layers.7.mlp.up_proj.weight"] = np.zeros((16, 16), np.float32)
        arrays["lm_head.weight"] = np.zeros((24, 15), np.float32)
        arrays["model.layers.1.input_layernorm.weight"] = np.zeros(16, np.int32)

    _edit(directory, spoil)
    with pytest.raises(ValueError) as error:
        pretrained.load_llm(directory)
    for part in (
        "missing: model.norm.weight",
        "unexpected: model.extra.weight [3]",
        "model.layers.7.mlp.up_proj.weight [16, 16] in model.safetensors: the model has 2 layers",
        "mis-shaped: lm_head.weight [24, 15] in model.safetensors: the model has [24, 16]",
        "not floating point: model.layers.1.input_layernorm.weight [16]",
    ):
        assert part in str(error.value)


def test_files_that_are_cut_or_no_safetensors_are_named(directory):
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    header_size = int.from_bytes(whole[:8], "little")
    offsets = {k: v for k, v in json.loads(whole[8 : 8 + header_size]).items() if k[0] != "_"}
    last = max(offsets, key=lambda name: offsets[name]["data_offsets"][1])
    with pytest.raises(ValueError, match=f"model.safetensors: .*cut off: {last}"):
        pretrained.load_llm(directory)
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="model.safetensors: .*header cannot be read"):
        pretrained.load_llm(directory)


def test_values_that_are_not_finite_are_named(directory):
    def spoil(arrays):
        arrays["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
        arrays["model.norm.weight"][0] = np.inf

    _edit(directory, spoil)
    with pytest.raises(ValueError, match="not finite: model.norm.weight") as error:
        pretrained.load_llm(directory)
    assert "not finite: model.layers.1.mlp.up_proj.weight" in str(error.value)


def test_many_files_and_their_index(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "MAX_FILE_BYTES", 4000)
    pretrained.save_llm(tmp_path, *llm)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    _, params = pretrained.load_llm(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, llm[1])

    index = tmp_path / load.INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    # A tensor in two files, one that is not where the index says, and a file that is gone.
    arrays = load_file(files[0])
    duplicate = next(iter(arrays))
    save_file(load_file(files[1]) | {duplicate: arrays[duplicate]}, files[1])
    with pytest.raises(ValueError, match=f"duplicate: {duplicate} .*{files[0].name}"):
        pretrained.load_llm(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {"ghost": files[0].name}}))
    with pytest.raises(ValueError, match=f"{files[0].name}: lacks ghost"):
        pretrained.load_llm(tmp_path)
    outside = tmp_path.parent / "outside.safetensors"
    save_file(arrays, outside)
    for file in (str(outside), "../outside.safetensors", 7, ["a.safetensors"], "a.bin", ""):
        index.write_text(json.dumps({"weight_map": weight_map | {"ghost": file}}))
        with pytest.raises(ValueError, match="points to .*, no file beside it"):
            pretrained.load_llm(tmp_path)
    for broken in ("[]", "{", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(broken)
        with pytest.raises(ValueError, match="index.json: (has no weight_map|not valid JSON)"):
            pretrained.load_llm(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    files[1].unlink()
    with pytest.raises(ValueError, match=f"{files[1].name}: named in .* but missing"):
        pretrained.load_llm(tmp_path)


def test_loads_into_a_sharding_and_dtype(llm, directory):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    specs = {1: P("tensor"), 2: P(None, "tensor"), 3: P(None, "tensor", "fsdp")}

    def shardings(shapes):
        return jax.tree.map(lambda s: NamedSharding(mesh, specs[s.ndim]), shapes)

    model, params = pretrained.load_llm(directory, dtype="bfloat16", shardings=shardings)
    assert model.config == dataclasses.replace(CONFIG, dtype="bfloat16")

    def check(leaf, wanted, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim) and leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, wanted.astype(jnp.bfloat16))

    jax.tree.map(check, params, llm[1], shardings(llm[1]))


def test_lora_must_be_merged_before_saving(llm, tmp_path):
    model, params = llm
    adapted = lora.add(params, "head/kernel", 2, jax.random.key(0))
    with pytest.raises(ValueError, match="merge LoRA before saving.*head/lora_a"):
        pretrained.save_llm(tmp_path, model, adapted)


def test_other_strides_than_whispers_round_trip(tmp_path):
    config = SpeechEncoderConfig(
        embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8, num_mels=4, strides=(2, 2, 2)
    )
    encoder = SpeechEncoder(config)
    inputs = jnp.zeros((1, 16, 4)), jnp.array([16])
    params = jax.jit(encoder.init)(jax.random.key(0), *inputs)["params"]
    pretrained.save_speech_encoder(tmp_path, encoder, params)
    again, loaded = pretrained.load_speech_encoder(tmp_path)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# --- config.json -------------------------------------------------------------

SCALINGS = (
    None,
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 64, low_freq_factor=2.0, high_freq_factor=3.0),
    RopeScaling("yarn", 4.0, 64, attention_factor=1.3, truncate=False),
)
LONGROPE = RopeScaling(
    "longrope", 8.0, 64, attention_factor=1.2, short_factors=(1.0, 1.5), long_factors=(2.0, 3.0)
)
POST_NORMS = dict(pre_norms=False, post_norms=True)
GEMMA = dict(
    norm_offset=1.0,
    post_norms=True,
    embed_scale=4.0,
    attn_scale=24**-0.5,
    activation="gelu_tanh",
    sliding_window=7,
    local_layers=(True, False),
)


@pytest.mark.parametrize(
    "changes",
    [
        *({"rope_scaling": scaling, "rope_theta": 777.0} for scaling in SCALINGS),
        {"tied_head": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_dim": 6},
        {"family": "mistral", "sliding_window": 3},
        {"family": "mistral"},
        {"family": "qwen2", "qkv_bias": True, "sliding_window": 3, "local_layers": (False, True)},
        {"family": "qwen3", "qk_norm": True},
        {"family": "gemma2", "attn_softcap": 50.0, "logit_softcap": 30.0} | GEMMA,
        {"family": "gemma3_text", "qk_norm": True, "local_rope_theta": 100.0} | GEMMA,
        {"family": "phi3", "rotary_dim": 4, "rope_scaling": LONGROPE, "sliding_window": 3},
        {"family": "ministral3", "rope_scaling": RopeScaling("yarn", 4.0, 64, query_beta=0.1)},
        {"family": "ministral3"},
        {"family": "olmo2", "qk_norm": True, "qk_norm_whole": True} | POST_NORMS,
        {"family": "granite", "attn_scale": 0.3, "residual_scale": 0.2, "logit_divisor": 8.0},
        {
            "family": "smollm3",
            "local_layers": (False, True),
            "local_rope_theta": math.inf,
            "tied_head": True,
        },
    ],
)
def test_config_json_reads_back_to_the_same_config(changes):
    config = dataclasses.replace(CONFIG, **changes)
    raw = json.loads(json.dumps(configs.llm_config_json(config)))
    assert configs.llm_config(raw) == config


def test_a_family_refuses_what_it_cannot_say():
    config = dataclasses.replace(CONFIG, qk_norm=True, logit_softcap=5.0)
    with pytest.raises(ValueError, match="llama model cannot have qk_norm=True, logit_softcap=5.0"):
        configs.llm_config_json(config)


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; llama, mistral"),
        ({"model_type": "llama", "alibi": True}, "unknown key 'alibi' = True"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "llama", "hidden_act": "xielu"}, "activation 'xielu' is not one of silu"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "'llama3' lacks high_freq_factor, low_freq_factor, original_max_position_embeddings",
        ),
        (
            {"model_type": "qwen3", "rope_parameters": {"partial_rotary_factor": 0.5}},
            "unknown partial_rotary_factor",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.41}, "39 of 96 dimensions turn"),
        (
            {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 8},
            "use_sliding_window: layers without rotation",
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "only causal"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 32}, "'chunked_attention'"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, "1 entries for 26"),
    ],
)
def test_configs_that_would_be_computed_wrongly_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        configs.llm_config(raw)


def test_defaults_are_those_of_the_family():
    # Gemma 3 4B's text config leaves out all that its class has as default.
    config = configs.llm_config({"model_type": "gemma3_text", "num_hidden_layers": 12})
    assert config.local_layers == (True,) * 5 + (False,) + (True,) * 5 + (False,)
    assert (config.rope_theta, config.local_rope_theta, config.head_dim) == (1e6, 1e4, 256)
    assert config.tied_head and not configs.llm_config({"model_type": "llama"}).tied_head
    assert configs.llm_config({"model_type": "qwen2", "unused": None}).sliding_window is None


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory, and not a hub id"):
        pretrained.load_llm(tmp_path / "absent")
    with pytest.raises(ValueError, match="give the commit to pin as its revision"):
        pretrained.load_llm("owner/name")
    with pytest.raises(FileNotFoundError, match="config.json: missing"):
        pretrained.load_llm(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        pretrained.load_llm(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match="convert them to safetensors"):
        pretrained.load_llm(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "encodec"}')
    with pytest.raises(ValueError, match="'encodec' is no speech encoder"):
        pretrained.load_speech_encoder(tmp_path)


def test_hub_ids_are_fetched_at_their_revision_without_pickles_or_code(monkeypatch, tmp_path):
    calls = []

    def download(name, revision, allow_patterns):
        calls.append((name, revision))
        assert not any(fnmatch.fnmatch("model.bin", pattern) for pattern in allow_patterns)
        assert not any(fnmatch.fnmatch("modeling.py", pattern) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="config.json: missing"):
        pretrained.load_llm("owner/name", revision="0123abc")
    assert calls == [("owner/name", "0123abc")]
