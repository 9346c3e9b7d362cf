"""config.json of Hugging Face directories to and from this project's configurations.

Every key that `transformers` computes with is read here or refused; every value is checked before
memory is taken for it. Keys that change nothing are passed over, those not known in one line.
"""

import dataclasses
import math
from typing import Any

from otreg_jax.models.llm import LLMConfig, RopeScaling
from otreg_jax.pretrained import checks, layouts
from otreg_jax.pretrained.families import ARCHITECTURES, FAMILIES, INSIDE

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


def llm_config(raw: dict[str, Any], where: str = "config.json") -> LLMConfig:
    """The LLMConfig of a parsed config.json; of a model of text and images, that of its LLM.

    Raises ValueError, listing every problem, for an architecture, a key or a value this project
    does not compute exactly.
    """
    raw = checks.parsed(raw, where)
    layout = layouts.name(raw)
    raw = _language_part(raw, where)
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
    if act not in ACTIVATIONS:
        problems.append(f"activation {act!r} is not one of {', '.join(ACTIVATIONS)}")
    if c.get("use_bidirectional_attention"):
        problems.append("use_bidirectional_attention: only causal models are supported")
    if family == "gemma3_text" and c["attn_logit_softcapping"] is not None:
        problems.append("attn_logit_softcapping: Gemma 3 has none")
    local_layers = _local_layers(family, c, problems)
    theta, scaling, local_theta, turned = _rope(family, c, head_dim, problems)
    if family == "smollm3" and c["use_sliding_window"] and any(local_layers):
        problems.append("use_sliding_window: layers without rotation have no window here")
    # SmolLM3's other layers differ in rotation only.
    windowed = local_layers is None or any(local_layers) and family != "smollm3"
    checks.raise_all(problems, where)
    checks.name_passed_over(raw, defaults, where)
    biased = c.get("attention_bias", False)
    attn_scale = c.get("attention_multiplier")  # Granite's
    if gemma:
        attn_scale = c["query_pre_attn_scalar"] ** -0.5
    config = LLMConfig(
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=c["intermediate_size"],
        tied_head=c["tie_word_embeddings"],
        activation=ACTIVATIONS[act],
        norm_eps=c["rms_norm_eps"],
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma or family == "olmo2",
        pre_norms=family != "olmo2",
        qk_norm=family in ("qwen3", "gemma3_text", "olmo2"),
        qk_norm_whole=family == "olmo2",
        qkv_bias=biased or family == "qwen2",
        out_bias=biased,
        mlp_bias=c.get("mlp_bias", False),
        embed_scale=math.sqrt(c["hidden_size"]) if gemma else c.get("embedding_multiplier", 1.0),
        attn_scale=attn_scale,
        residual_scale=c.get("residual_multiplier", 1.0),
        logit_divisor=c.get("logits_scaling", 1.0),
        attn_softcap=c.get("attn_logit_softcapping"),
        logit_softcap=c.get("final_logit_softcapping"),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=None if turned == head_dim else turned,
        sliding_window=c.get("sliding_window") if windowed else None,
        local_layers=local_layers if windowed or local_theta else None,
        local_rope_theta=local_theta,
        max_positions=c["max_position_embeddings"],
        family=family,
    )
    checks.raise_all(layouts.llm_obstacles(layout, config) if layout else [], where)
    return config


def _language_part(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """`raw`, or what a model of text and images or speech says about the LLM inside it."""
    if layouts.name(raw):
        return layouts.text_part(raw, where)
    kind = str(raw.get("model_type"))
    if kind not in INSIDE:
        return raw
    inside = checks.parsed(raw.get("text_config"), f"{where}: text_config")
    stored = {key: raw[key] for key in ("quantization_config",) if key in raw}  # of all weights
    return {"model_type": INSIDE[kind]} | stored | inside


def _local_layers(family: str, c: dict, problems: list[str]) -> tuple[bool, ...] | None:
    """For each layer whether its attention is a sliding window or, of SmolLM3, not rotated; None:
    all have the one window, if there is one."""
    if "layer_types" not in c:
        return None
    n, kinds = c["num_hidden_layers"], c["layer_types"]
    if family == "smollm3":
        rotated = c["no_rope_layers"]
        if rotated is None:
            interval = c["no_rope_layer_interval"]
            rotated = [(i + 1) % interval != 0 for i in range(n)]
        if len(rotated) < n or set(kinds or ()) - {"full_attention"}:
            problems.append(f"no_rope_layers, layer_types: not {n} layers of full attention")
        return tuple(not turned for turned in rotated[:n])
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
    "longrope": {"short_factor", "long_factor", "original_max_position_embeddings"},
}
_OPTIONS = {
    "yarn": {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "llama_4_scaling_beta",
        "max_position_embeddings",
    },
    "longrope": {"attention_factor", "factor"},
}


def _rope(
    family: str, c: dict, head_dim: int, problems: list[str]
) -> tuple[float, RopeScaling | None, float | None, int]:
    """(base, scaling, base of the local layers, dimensions of a head that are turned) from the old
    keys or from `rope_parameters`."""
    rope = c["rope_parameters"] or {}
    local_theta = None
    if family == "gemma3_text":
        kinds = {kind: rope.get(kind) or {} for kind in ("sliding_attention", "full_attention")}
        if wrong := checks.wrong_values(kinds, dict.fromkeys(kinds, checks.OBJECT)):
            problems += [f"rope_parameters: {problem}" for problem in wrong]
            return c["rope_theta"], None, None, head_dim
        local_theta, scaled = _scaling(
            c["rope_local_base_freq"], kinds["sliding_attention"], problems
        )
        if scaled is not None:
            problems.append("rope_parameters: scaled rotation of the local layers is not supported")
        rope = kinds["full_attention"]
    if family == "smollm3":
        local_theta = math.inf  # not rotated at all
    rope = {**(c["rope_scaling"] or {}), **rope}
    share = c.get("partial_rotary_factor", 1.0)
    if family == "phi3":
        share = rope.pop("partial_rotary_factor", None) or share
        if not checks.NUMBER.holds(share):
            problems.append(f"partial_rotary_factor is {share!r}, not {checks.NUMBER.words}")
            return c["rope_theta"], None, None, head_dim
        rope = _phi3_rope(rope, c)
    theta, scaling = _scaling(c["rope_theta"], rope, problems)
    turned = int(head_dim * share)
    if not 2 <= turned <= head_dim or turned % 2:
        problems.append(f"partial_rotary_factor={share}: {turned} of {head_dim} dimensions turn")
    if scaling and scaling.kind == "longrope" and len(scaling.short_factors) != turned // 2:
        problems.append(f"rope type 'longrope': short_factor is not of {turned // 2} numbers")
    return theta, scaling, local_theta, turned


def _phi3_rope(rope: dict, c: dict) -> dict:
    """Phi-3 calls its scaling by older names, and keeps its lengths beside it."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("su", "yarn", "longrope"):
        return rope
    original = c["original_max_position_embeddings"]
    stretched = {"factor": c["max_position_embeddings"] / original}
    fixed = {"rope_type": "longrope", "original_max_position_embeddings": original}
    return stretched | rope | fixed


def _scaling(theta: float, rope: dict, problems: list[str]) -> tuple[float, RopeScaling | None]:
    """(base, scaling) of one kind of layers; `theta`: the base where `rope` gives none."""
    rope = {key: value for key, value in rope.items() if value is not None}
    if wrong := checks.wrong_values(rope, checks.ROPE):
        problems += [f"rope: {problem}" for problem in wrong]
        return theta, None
    theta = rope.pop("rope_theta", theta)
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    for key, nothing in (("partial_rotary_factor", 1), ("llama_4_scaling_beta", 0)):
        if rope.get(key) == nothing:
            del rope[key]
    if kind not in _SCALING_KEYS:
        problems.append(f"rope type {kind!r} is not one of {', '.join(_SCALING_KEYS)}")
        return theta, None
    required, options = _SCALING_KEYS[kind], _OPTIONS.get(kind, set())
    missing, unknown = required - set(rope), set(rope) - required - options
    if missing:
        problems.append(f"rope type {kind!r} lacks {', '.join(sorted(missing))}")
    if unknown:
        problems.append(f"rope type {kind!r}: unknown {', '.join(sorted(unknown))}")
    if kind == "default" or missing or unknown:
        return theta, None
    original = rope.get("original_max_position_embeddings", 0)
    scaling = RopeScaling(kind, rope.get("factor", 1.0), original)
    if kind == "llama3":
        scaling = dataclasses.replace(
            scaling,
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
        )
    if kind == "yarn":
        scaling = dataclasses.replace(
            scaling,
            beta_fast=rope.get("beta_fast", 32.0),
            beta_slow=rope.get("beta_slow", 1.0),
            truncate=rope.get("truncate", True),
            attention_factor=rope.get("attention_factor", _yarn_gain(rope)),
            query_beta=rope.get("llama_4_scaling_beta", 0.0),
        )
    if kind == "longrope":
        stretch = math.log(max(scaling.factor, 1.0)) / math.log(max(original, 2))
        scaling = dataclasses.replace(
            scaling,
            short_factors=tuple(rope["short_factor"]),
            long_factors=tuple(rope["long_factor"]),
            attention_factor=rope.get("attention_factor", math.sqrt(1 + stretch)),
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
    raw = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "embedding_multiplier": config.embed_scale,
        "attention_multiplier": config.attn_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logit_divisor,
        "partial_rotary_factor": (config.rotary_dim or config.head_dim) / config.head_dim,
        "hidden_activation": ACTIVATION_NAMES[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_positions,
        "pad_token_id": None,  # some classes have one that a small vocabulary does not hold
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
    if config.attn_scale is not None and config.family != "granite":
        # A whole number in every model there is; reading it back must give the same float.
        raw["query_pre_attn_scalar"] = round(config.attn_scale**-2)
    if "layer_types" in FAMILIES[config.family]:
        local = config.local_layers or (config.sliding_window is not None,) * config.num_layers
        kinds = ("full_attention", "sliding_attention")
        raw["layer_types"] = [kinds[is_local] for is_local in local]
    if config.family == "ministral3":  # whose class takes no scaling for that of its default
        rope = {
            "rope_theta": config.rope_theta,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.0,
        }
        raw |= {"rope_parameters": rope | (raw["rope_scaling"] or {}), "rope_scaling": None}
    if config.family == "smollm3":
        local = config.local_layers or (False,) * config.num_layers
        raw |= {"no_rope_layers": [int(not is_local) for is_local in local], "layer_types": None}
    if config.family == "phi3" and config.rope_scaling:
        raw["original_max_position_embeddings"] = config.rope_scaling.original_length
    always = ("architectures", "model_type", "max_position_embeddings", "pad_token_id")
    known = {*always, *FAMILIES[config.family]}
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
    if scaling.kind == "longrope":
        return raw | {
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            "attention_factor": scaling.attention_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    if scaling.query_beta:
        raw["llama_4_scaling_beta"] = scaling.query_beta
    if scaling.kind in ("llama3", "yarn"):
        raw["original_max_position_embeddings"] = scaling.original_length
    names = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    return raw | {name: getattr(scaling, name) for name in names[scaling.kind]}
