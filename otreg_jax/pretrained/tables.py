"""Hugging Face's names: config.json and tensor names to and from this project's, one table each.

This is the only place that knows them. A tensor table lists (name, path, axes): the tensor's name
with {layer} for the layer number, the parameter's path, and the transposition between the two (its
own inverse, as every one reverses the axes). Weights are never changed otherwise.
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

from otreg_jax.models.llm import LLMConfig, RopeScaling
from otreg_jax.models.speech_encoder import SpeechEncoderConfig

KEEP = None
MATRIX = (1, 0)  # torch stores Linear weights [out, in]
CONV = (2, 1, 0)  # and Conv1d weights [out, in, width]


class Row(NamedTuple):
    name: str
    path: str
    axes: tuple[int, ...] | None


class Table(NamedTuple):
    """rows: as above. prefix: a regex of what may stand before every name. ignored: regexes of
    tensors that are not ours to load."""

    rows: tuple[Row, ...]
    prefix: str
    ignored: tuple[str, ...]


# --- LLM tensors -------------------------------------------------------------


def llm_table(config: LLMConfig) -> Table:
    """The tensors of an LLM of one of FAMILIES."""
    rows = [
        Row("model.embed_tokens.weight", "embed/embedding", KEEP),
        Row("model.norm.weight", "norm/scale", KEEP),
    ]
    ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if config.tied_head:
        ignored.append(r"lm_head\.weight")
    else:
        rows.append(Row("lm_head.weight", "head/kernel", MATRIX))
    layer = "model.layers.{layer}"
    dense = [("self_attn", "attn", name) for name in "qkvo"]
    dense += [("mlp", "mlp", name) for name in ("gate", "up", "down")]
    biased = dict.fromkeys("qkv", config.qkv_bias) | {"o": config.out_bias}
    for theirs, ours, name in dense:
        source, target = f"{layer}.{theirs}.{name}_proj", f"layers/{ours}/{name}"
        rows.append(Row(f"{source}.weight", f"{target}/kernel", MATRIX))
        if biased.get(name, config.mlp_bias):
            rows.append(Row(f"{source}.bias", f"{target}/bias", KEEP))
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms = {
            "attn_norm": "input_layernorm",
            "attn_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm:
        norms |= {"attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"}
    rows += [
        Row(f"{layer}.{theirs}.weight", f"layers/{ours}/scale", KEEP)
        for ours, theirs in norms.items()
    ]
    return Table(tuple(rows), "", tuple(ignored))


# --- LLM config --------------------------------------------------------------

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
# Keys that do not change what an LLM computes at inference.
_HARMLESS = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path _sliding_window_pattern
    architectures attention_dropout auto_map bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout dtype eos_token_id hidden_dropout id2label
    initializer_range label2id max_position_embeddings model_type output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type return_dict tokenizer_class
    torch_dtype transformers_version unsloth_fixed unsloth_version use_cache""".split()
)
# What a family's keys are when config.json leaves them out: the defaults of its class in
# transformers. A key that is neither here nor harmless is refused.
_COMMON = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}
_QWEN = _COMMON | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = _COMMON | {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "unused",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "use_bidirectional_attention": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"attention_bias": False, "mlp_bias": False},
    "mistral": _COMMON
    | {"intermediate_size": 14_336, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
    "gemma2": _GEMMA
    | {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window_size": None,  # the old name, always beside the new one
    },
    "gemma3_text": _GEMMA
    | {
        "vocab_size": 262_208,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def llm_config(raw: dict[str, Any], where: str = "config.json") -> LLMConfig:
    """The LLMConfig of a parsed config.json.

    Raises ValueError, listing every problem, for an architecture, a key or a value this project
    does not compute exactly.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{where}: model_type {family!r} is not supported; {', '.join(FAMILIES)} are"
        )
    defaults = FAMILIES[family]
    # An unknown key that is off (null, false, empty) cannot change anything.
    problems = [
        f"unknown key {key!r} = {value!r}: it may change what the model computes; remove it if not"
        for key, value in raw.items()
        if key not in defaults and key not in _HARMLESS and value not in (None, False, {}, [])
    ]
    c = defaults | {key: value for key, value in raw.items() if key in defaults}
    gemma = family.startswith("gemma")
    heads = c["num_attention_heads"]
    act = c["hidden_activation"] if gemma else c["hidden_act"]
    if act not in _ACTIVATIONS:
        problems.append(f"activation {act!r} is not one of {', '.join(_ACTIVATIONS)}")
    if c.get("use_bidirectional_attention"):
        problems.append("use_bidirectional_attention: only causal models are supported")
    if family == "gemma3_text" and c["attn_logit_softcapping"] is not None:
        problems.append("attn_logit_softcapping: Gemma 3 has none")
    local_layers = _local_layers(family, c, problems)
    windowed = local_layers is None or any(local_layers)
    theta, scaling, local_theta = _rope(family, c, problems)
    if problems:
        raise ValueError(f"{where} ({family}):\n  " + "\n  ".join(problems))
    biased = c.get("attention_bias", False)
    return LLMConfig(
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=c["num_key_value_heads"] or heads,
        head_dim=c["head_dim"] or c["hidden_size"] // heads,
        mlp_dim=c["intermediate_size"],
        tied_head=c["tie_word_embeddings"],
        activation=_ACTIVATIONS[act],
        norm_eps=c["rms_norm_eps"],
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        qk_norm=family in ("qwen3", "gemma3_text"),
        qkv_bias=biased or family == "qwen2",
        out_bias=biased,
        mlp_bias=c.get("mlp_bias", False),
        embed_scale=math.sqrt(c["hidden_size"]) if gemma else 1.0,
        attn_scale=c["query_pre_attn_scalar"] ** -0.5 if gemma else None,
        attn_softcap=c.get("attn_logit_softcapping"),
        logit_softcap=c.get("final_logit_softcapping"),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=c.get("sliding_window") if windowed else None,
        local_layers=local_layers if windowed else None,
        local_rope_theta=local_theta,
        max_positions=raw.get("max_position_embeddings", 2048),
        family=family,
    )


def _local_layers(family: str, c: dict, problems: list[str]) -> tuple[bool, ...] | None:
    """For each layer whether its attention is a sliding window; None: all have the one window."""
    if family in ("llama", "mistral"):
        return None
    n, kinds = c["num_hidden_layers"], c["layer_types"]
    if kinds is not None:
        if len(kinds) != n:
            problems.append(f"layer_types has {len(kinds)} entries for {n} layers")
        for kind in sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            problems.append(f"layer_types: {kind!r} is not supported")
        local = tuple(kind == "sliding_attention" for kind in kinds)
    elif family.startswith("qwen"):
        first = c["max_window_layers"] if c["use_sliding_window"] else n
        local = tuple(i >= first for i in range(n))
    else:
        pattern = c.get("sliding_window_pattern", 2)
        local = tuple((i + 1) % pattern != 0 for i in range(n))
    if any(local) and c["sliding_window"] is None:
        problems.append("sliding_window is null but layer_types has sliding_attention")
    return local


_SCALING_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
_YARN_OPTIONS = {
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


def _rope(
    family: str, c: dict, problems: list[str]
) -> tuple[float, RopeScaling | None, float | None]:
    """(base, scaling, base of the local layers) from the old keys or from `rope_parameters`."""
    rope = c["rope_parameters"] or {}
    local_theta = None
    if family == "gemma3_text":
        local = dict(rope.get("sliding_attention") or {})
        local_theta = local.pop("rope_theta", c["rope_local_base_freq"])
        if _scaling(local, problems) is not None:
            problems.append("rope_parameters: scaled rotation of the local layers is not supported")
        rope = rope.get("full_attention") or {}
    rope = {**(c["rope_scaling"] or {}), **rope}
    theta = rope.pop("rope_theta", c["rope_theta"])
    return theta, _scaling(rope, problems), local_theta


def _scaling(rope: dict, problems: list[str]) -> RopeScaling | None:
    rope = {key: value for key, value in rope.items() if value is not None}
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    if kind not in _SCALING_KEYS:
        problems.append(f"rope type {kind!r} is not one of {', '.join(_SCALING_KEYS)}")
        return None
    required, options = _SCALING_KEYS[kind], _YARN_OPTIONS if kind == "yarn" else set()
    missing, unknown = required - set(rope), set(rope) - required - options
    if missing:
        problems.append(f"rope type {kind!r} lacks {', '.join(sorted(missing))}")
    if unknown:
        problems.append(f"rope type {kind!r}: unknown {', '.join(sorted(unknown))}")
    if kind == "default" or missing or unknown:
        return None
    scaling = RopeScaling(kind, rope["factor"])
    if kind == "llama3":
        scaling = dataclasses.replace(
            scaling,
            original_length=rope["original_max_position_embeddings"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
        )
    if kind == "yarn":
        scaling = dataclasses.replace(
            scaling,
            original_length=rope["original_max_position_embeddings"],
            beta_fast=rope.get("beta_fast", 32.0),
            beta_slow=rope.get("beta_slow", 1.0),
            truncate=rope.get("truncate", True),
            attention_factor=rope.get("attention_factor", _yarn_gain(rope)),
        )
    return scaling


def _yarn_gain(rope: dict) -> float:
    def gain(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return gain(rope["mscale"]) / gain(rope["mscale_all_dim"])
    return gain(1.0)


def llm_config_json(config: LLMConfig) -> dict[str, Any]:
    """The config.json of an LLMConfig; `llm_config` reads it back to the same one.

    Raises ValueError when the family has no way to say what the config holds.
    """
    activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    raw = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation[config.activation],
        "hidden_activation": activation[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_json(config.rope_scaling),
        "rope_local_base_freq": config.local_rope_theta,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
    }
    if config.attn_scale is not None:
        # A whole number in every model there is; reading it back must give the same float.
        raw["query_pre_attn_scalar"] = round(config.attn_scale**-2)
    if "layer_types" in FAMILIES[config.family]:
        local = config.local_layers or (config.sliding_window is not None,) * config.num_layers
        kinds = ("full_attention", "sliding_attention")
        raw["layer_types"] = [kinds[is_local] for is_local in local]
    known = {"architectures", "model_type", "max_position_embeddings", *FAMILIES[config.family]}
    raw = {key: value for key, value in raw.items() if key in known}
    how = {name: getattr(config, name) for name in ("dtype", "remat", "attention")}
    back = dataclasses.replace(llm_config(raw), **how)
    differing = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(back, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise ValueError(f"a {config.family} model cannot have {', '.join(differing)}")
    return raw


def _scaling_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    raw: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        raw["original_max_position_embeddings"] = scaling.original_length
    names = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    return raw | {name: getattr(scaling, name) for name in names[scaling.kind]}


# --- Speech encoder ----------------------------------------------------------


def speech_encoder_table(config: SpeechEncoderConfig) -> Table:
    """The tensors of a Whisper encoder, alone or inside a whole Whisper model."""
    rows = [Row("embed_positions.weight", "positions/embedding", KEEP)]
    for i in range(1, len(config.strides) + 1):
        rows.append(Row(f"conv{i}.weight", f"conv{i}/kernel", CONV))
        rows.append(Row(f"conv{i}.bias", f"conv{i}/bias", KEEP))
    layer = "layers.{layer}"
    dense = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    dense = {f"attn/{ours}": f"self_attn.{theirs}" for ours, theirs in dense.items()}
    for ours, theirs in (dense | {"mlp/up": "fc1", "mlp/down": "fc2"}).items():
        rows.append(Row(f"{layer}.{theirs}.weight", f"layers/{ours}/kernel", MATRIX))
        if ours != "attn/k":
            rows.append(Row(f"{layer}.{theirs}.bias", f"layers/{ours}/bias", KEEP))
    norms = {
        "norm": "layer_norm",
        "layers/attn_norm": f"{layer}.self_attn_layer_norm",
        "layers/mlp_norm": f"{layer}.final_layer_norm",
    }
    for ours, theirs in norms.items():
        rows.append(Row(f"{theirs}.weight", f"{ours}/scale", KEEP))
        rows.append(Row(f"{theirs}.bias", f"{ours}/bias", KEEP))
    ignored = (r"(model\.)?decoder\..*", r"proj_out\.weight")
    return Table(tuple(rows), r"(model\.)?(encoder\.)?", ignored)


_WHISPER_STRIDES = (1, 2)
_OWN_ENCODER = "otreg_speech_encoder"  # what Whisper's architecture cannot say: other strides


def speech_encoder_config(raw: dict[str, Any], where: str = "config.json") -> SpeechEncoderConfig:
    """The SpeechEncoderConfig of Whisper's config.json; ValueError for any other architecture."""
    kind = raw.get("model_type")
    if kind not in ("whisper", _OWN_ENCODER):
        raise ValueError(f"{where}: model_type {kind!r} is no speech encoder; whisper is supported")
    activation = raw.get("activation_function", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{where}: activation_function {activation!r} is not supported")
    strides = raw["strides"] if kind == _OWN_ENCODER else _WHISPER_STRIDES
    return SpeechEncoderConfig(
        embed_dim=raw.get("d_model", 384),
        num_layers=raw.get("encoder_layers", 4),
        num_heads=raw.get("encoder_attention_heads", 6),
        mlp_dim=raw.get("encoder_ffn_dim", 1536),
        num_mels=raw.get("num_mel_bins", 80),
        max_positions=raw.get("max_source_positions", 1500),
        strides=tuple(strides),
        activation=_ACTIVATIONS[activation],
    )


def speech_encoder_config_json(config: SpeechEncoderConfig) -> dict[str, Any]:
    """The config.json of a speech encoder: Whisper's, unless its strides are others."""
    activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    raw = {
        "architectures": ["WhisperEncoder"],
        "model_type": "whisper",
        "d_model": config.embed_dim,
        "encoder_layers": config.num_layers,
        "encoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.mlp_dim,
        "num_mel_bins": config.num_mels,
        "max_source_positions": config.max_positions,
        "activation_function": activation[config.activation],
    }
    if config.strides != _WHISPER_STRIDES:
        raw |= {"architectures": [], "model_type": _OWN_ENCODER, "strides": list(config.strides)}
    return raw


def name_pattern(table: Table, row: Row) -> re.Pattern:
    """The regex of a row's tensor names; its group `layer` is the layer number."""
    name = re.escape(row.name).replace(re.escape("{layer}"), r"(?P<layer>\d+)")
    return re.compile(table.prefix + name)
