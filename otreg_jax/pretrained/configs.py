"""config.json of Hugging Face directories to and from this project's configurations.

Every key that `transformers` computes with is read here or refused; every value is checked before
memory is taken for it. Keys that change nothing are passed over, those not known in one line.
"""

import dataclasses
import math
from typing import Any

from otreg_jax.models.llm import LLMConfig, RopeScaling
from otreg_jax.models.speech_encoder import SpeechEncoderConfig
from otreg_jax.pretrained import checks

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
# What a family's keys are when config.json leaves them out: the defaults of its class in
# transformers.
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
_MISTRAL = _COMMON | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
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
    "mistral": _MISTRAL,
    "ministral": _MISTRAL | {"layer_types": None},
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
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# Models of text and images: the LLM inside them, which is read alone.
_INSIDE = {"gemma3": "gemma3_text"}

# --- LLM ---------------------------------------------------------------------


def llm_config(raw: dict[str, Any], where: str = "config.json") -> LLMConfig:
    """The LLMConfig of a parsed config.json; of a model of text and images, that of its LLM.

    Raises ValueError, listing every problem, for an architecture, a key or a value this project
    does not compute exactly.
    """
    raw = _language_part(checks.parsed(raw, where), where)
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise ValueError(
            f"{where}: model_type {family!r} is not supported; {', '.join(FAMILIES)} are"
        )
    where = f"{where} ({family})"
    defaults = FAMILIES[family]
    c = defaults | {key: value for key, value in raw.items() if key in defaults}
    c["max_position_embeddings"] = raw.get("max_position_embeddings", 2048)
    problems = checks.refused_keys(raw, defaults) + checks.wrong_values(c, checks.LLM)
    checks.raise_all(problems, where)  # what follows computes with the values
    gemma = family.startswith("gemma")
    heads = c["num_attention_heads"]
    kv_heads = c["num_key_value_heads"] or heads
    problems += checks.indivisible("num_attention_heads", heads, kv_heads)
    if not c["head_dim"]:
        problems += checks.indivisible("hidden_size", c["hidden_size"], heads)
    head_dim = c["head_dim"] or c["hidden_size"] // heads
    if head_dim % 2:
        problems.append(f"head_dim={head_dim} is odd, and rotary positions turn pairs")
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
    checks.raise_all(problems, where)
    checks.name_passed_over(raw, defaults, where)
    biased = c.get("attention_bias", False)
    return LLMConfig(
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
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
        max_positions=c["max_position_embeddings"],
        family=family,
    )


def _language_part(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """`raw`, or what a model of text and images says about the LLM inside it."""
    kind = str(raw.get("model_type"))
    if kind not in _INSIDE:
        return raw
    inside = checks.parsed(raw.get("text_config"), f"{where}: text_config")
    stored = {key: raw[key] for key in ("quantization_config",) if key in raw}  # of all weights
    return {"model_type": _INSIDE[kind]} | stored | inside


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
    elif family == "ministral":
        local = (c["sliding_window"] is not None,) * n
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
        kinds = {kind: rope.get(kind) or {} for kind in ("sliding_attention", "full_attention")}
        if wrong := checks.wrong_values(kinds, dict.fromkeys(kinds, checks.OBJECT)):
            problems += [f"rope_parameters: {problem}" for problem in wrong]
            return c["rope_theta"], None, None
        local_theta, scaled = _scaling(
            c["rope_local_base_freq"], kinds["sliding_attention"], problems
        )
        if scaled is not None:
            problems.append("rope_parameters: scaled rotation of the local layers is not supported")
        rope = kinds["full_attention"]
    theta, scaling = _scaling(c["rope_theta"], {**(c["rope_scaling"] or {}), **rope}, problems)
    return theta, scaling, local_theta


def _scaling(theta: float, rope: dict, problems: list[str]) -> tuple[float, RopeScaling | None]:
    """(base, scaling) of one kind of layers; `theta`: the base where `rope` gives none."""
    rope = {key: value for key, value in rope.items() if value is not None}
    if wrong := checks.wrong_values(rope, checks.ROPE):
        problems += [f"rope: {problem}" for problem in wrong]
        return theta, None
    theta = rope.pop("rope_theta", theta)
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    if kind not in _SCALING_KEYS:
        problems.append(f"rope type {kind!r} is not one of {', '.join(_SCALING_KEYS)}")
        return theta, None
    required, options = _SCALING_KEYS[kind], _YARN_OPTIONS if kind == "yarn" else set()
    missing, unknown = required - set(rope), set(rope) - required - options
    if missing:
        problems.append(f"rope type {kind!r} lacks {', '.join(sorted(missing))}")
    if unknown:
        problems.append(f"rope type {kind!r}: unknown {', '.join(sorted(unknown))}")
    if kind == "default" or missing or unknown:
        return theta, None
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
    return theta, scaling


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

_WHISPER = {  # the defaults of its class in transformers
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "activation_function": "gelu",
}
_WHISPER_STRIDES = (1, 2)
_OWN_ENCODER = "otreg_speech_encoder"  # what Whisper's architecture cannot say: other strides


def speech_encoder_config(raw: dict[str, Any], where: str = "config.json") -> SpeechEncoderConfig:
    """The SpeechEncoderConfig of Whisper's config.json.

    Raises ValueError, listing every problem, for any other architecture or a wrong value.
    """
    kind = str(checks.parsed(raw, where).get("model_type"))
    if kind not in ("whisper", _OWN_ENCODER):
        raise ValueError(f"{where}: model_type {kind!r} is no speech encoder; whisper is supported")
    c = _WHISPER | {key: value for key, value in raw.items() if key in _WHISPER}
    if kind == _OWN_ENCODER:
        c["strides"] = raw.get("strides")
    problems = checks.wrong_values(c, checks.SPEECH_ENCODER)
    checks.raise_all(problems, where)
    problems += checks.indivisible("d_model", c["d_model"], c["encoder_attention_heads"])
    if c["d_model"] % 2 or c["d_model"] < 4:
        problems.append(f"d_model={c['d_model']} is not even, or below 4: no position table")
    if c["activation_function"] not in _ACTIVATIONS:
        problems.append(f"activation_function {c['activation_function']!r} is not supported")
    checks.raise_all(problems, where)
    return SpeechEncoderConfig(
        embed_dim=c["d_model"],
        num_layers=c["encoder_layers"],
        num_heads=c["encoder_attention_heads"],
        mlp_dim=c["encoder_ffn_dim"],
        num_mels=c["num_mel_bins"],
        max_positions=c["max_source_positions"],
        strides=tuple(c.get("strides", _WHISPER_STRIDES)),
        activation=_ACTIVATIONS[c["activation_function"]],
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
