"""config.json of Hugging Face directories to and from this project's configurations.

Every key that `transformers` computes with is read here or refused; every value is checked before
memory is taken for it. Keys that change nothing are passed over, those not known in one line.
"""

import dataclasses
import math
from typing import Any

from otreg_jax.models.block import LLMConfig, WideHeads
from otreg_jax.models.delta import DeltaHeads
from otreg_jax.pretrained import checks, layouts, rotation
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
    gemma, gemma4 = family.startswith("gemma"), family == "gemma4_text"
    qwen3_5 = family == "qwen3_5_text"
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
    bidirectional = c.get("use_bidirectional_attention")
    if bidirectional and not (gemma4 and bidirectional == "vision"):  # text is causal
        problems.append("use_bidirectional_attention: only causal models are supported")
    if family == "gemma3_text" and c["attn_logit_softcapping"] is not None:
        problems.append("attn_logit_softcapping: Gemma 3 has none")
    local_layers = _local_layers(family, c, problems)
    wide = _wide(c, heads, local_layers, problems) if gemma4 else None
    delta = _delta(c, problems) if qwen3_5 else None
    theta, scaling, local_theta, turned = rotation.read(family, c, head_dim, problems)
    if family == "smollm3" and c["use_sliding_window"] and any(local_layers):
        problems.append("use_sliding_window: layers without rotation have no window here")
    # SmolLM3's other layers differ in rotation only, Qwen3.5's are no attention.
    no_window = family == "smollm3" or qwen3_5
    windowed = local_layers is None or any(local_layers) and not no_window
    checks.raise_all(problems, where)
    checks.name_passed_over(raw, defaults, where)
    biased = c.get("attention_bias", False)
    attn_scale = c.get("attention_multiplier")  # Granite's
    if gemma:
        attn_scale = 1.0 if gemma4 else c["query_pre_attn_scalar"] ** -0.5
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
        norm_offset=1.0 if (gemma and not gemma4) or qwen3_5 else 0.0,
        post_norms=gemma or family == "olmo2",
        pre_norms=family != "olmo2",
        qk_norm=family in ("qwen3", "qwen3_5_text", "gemma3_text", "gemma4_text", "olmo2"),
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
        local_layers=local_layers if windowed or local_theta or qwen3_5 else None,
        local_rope_theta=local_theta,
        gated=qwen3_5,
        delta=delta,
        wide=wide,
        value_norm=gemma4,
        layer_scalar=gemma4,
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
    # What is said of all weights.
    stored = {key: raw[key] for key in ("quantization_config", "tie_word_embeddings") if key in raw}
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
    other = _other_kind(family)
    if kinds is not None:
        if len(kinds) != n:
            problems.append(f"layer_types has {len(kinds)} entries for {n} layers")
        for kind in sorted(set(kinds) - {"full_attention", other}):
            problems.append(f"layer_types: {kind!r} is not supported")
        local = tuple(kind == other for kind in kinds)
    elif family == "qwen3_5_text":
        local = tuple((i + 1) % c["full_attention_interval"] != 0 for i in range(n))
    elif family == "ministral":
        local = (c["sliding_window"] is not None,) * n
    elif family.startswith("qwen"):
        first = c["max_window_layers"] if c["use_sliding_window"] else n
        local = tuple(i >= first for i in range(n))
    else:
        pattern = c.get("sliding_window_pattern", 6 if family == "gemma4_text" else 2)
        local = tuple((i + 1) % pattern != 0 for i in range(n))
    if family == "gemma4_text":
        local = (*local[:-1], False)  # the last layer is always global
    if any(local) and c.get("sliding_window", 0) is None:
        problems.append("sliding_window is null but layer_types has sliding_attention")
    return local


def _other_kind(family: str) -> str:
    """What `layer_types` calls the layers that `local_layers` marks."""
    return "linear_attention" if family == "qwen3_5_text" else "sliding_attention"


def _delta(c: dict, problems: list[str]) -> DeltaHeads:
    """Heads of Qwen3.5's linear layers."""
    keys, values = c["linear_num_key_heads"], c["linear_num_value_heads"]
    problems += checks.indivisible("linear_num_value_heads", values, keys)
    if not c["attn_output_gate"]:
        problems.append("attn_output_gate: attention without its gate is not computed")
    sizes = c["linear_key_head_dim"], c["linear_value_head_dim"], c["linear_conv_kernel_dim"]
    return DeltaHeads(keys, values, *sizes)


def _wide(c: dict, heads: int, local_layers, problems: list[str]) -> WideHeads | None:
    """Heads of Gemma 4's global layers. What else it may have, and this project has not, becomes a
    problem."""
    for key, what in _NOT_OF_GEMMA_4.items():
        if c[key]:
            problems.append(f"{key}={c[key]!r}: {what} are not computed")
    head_dim, kv_heads = c["global_head_dim"], c["num_key_value_heads"]
    if c["attention_k_eq_v"] and c["num_global_key_value_heads"]:
        kv_heads = c["num_global_key_value_heads"]
    if said := c["per_layer_config"]:
        wide = [str(i) for i, local in enumerate(local_layers) if not local]
        sizes = {key: checks.LLM[key] for key in ("head_dim", "num_key_value_heads")}
        one = said.get(wide[0])
        same = all(layer == one for layer in said.values()) and sorted(said) == sorted(wide)
        if not same or not checks.OBJECT.holds(one) or not set(one) <= set(sizes):
            problems.append("per_layer_config: not of the same heads in all global layers")
            return None
        if wrong := checks.wrong_values(one, sizes):
            problems += [f"per_layer_config: {problem}" for problem in wrong]
            return None
        head_dim, kv_heads = (
            one.get("head_dim", c["head_dim"]),
            one.get("num_key_value_heads", kv_heads),
        )
    problems += checks.indivisible("num_attention_heads", heads, kv_heads)
    return WideHeads(head_dim, kv_heads, c["attention_k_eq_v"])


_NOT_OF_GEMMA_4 = {
    "hidden_size_per_layer_input": "embeddings of each layer (Gemma 4 E2B, E4B)",
    "num_kv_shared_layers": "keys and values that layers share (Gemma 4 E2B, E4B)",
    "enable_moe_block": "experts (Gemma 4 26B-A4B)",
}


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
        "rope_scaling": rotation.scaling_json(config.rope_scaling),
        "rope_local_base_freq": config.local_rope_theta,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
    }
    if config.attn_scale is not None and "query_pre_attn_scalar" in FAMILIES[config.family]:
        # A whole number in every model there is; reading it back must give the same float.
        raw["query_pre_attn_scalar"] = round(config.attn_scale**-2)
    if "layer_types" in FAMILIES[config.family]:
        local = config.local_layers or (config.sliding_window is not None,) * config.num_layers
        kinds = ("full_attention", _other_kind(config.family))
        raw["layer_types"] = [kinds[is_local] for is_local in local]
    if h := config.delta:
        raw |= {
            "linear_num_key_heads": h.num_key_heads,
            "linear_num_value_heads": h.num_value_heads,
            "linear_key_head_dim": h.key_dim,
            "linear_value_head_dim": h.value_dim,
            "linear_conv_kernel_dim": h.conv_width,
            "rope_parameters": {
                "rope_theta": raw.pop("rope_theta"),
                "partial_rotary_factor": raw.pop("partial_rotary_factor"),
                **(raw.pop("rope_scaling") or {"rope_type": "default"}),
            },
        }
    if config.family == "gemma4_text":
        raw |= {
            "hidden_size_per_layer_input": 0,
            "global_head_dim": config.wide.head_dim,
            "num_global_key_value_heads": config.wide.num_kv_heads,
            "attention_k_eq_v": config.wide.value_is_key,
            "rope_parameters": {
                "full_attention": {
                    "rope_theta": raw.pop("rope_theta"),
                    **(raw.pop("rope_scaling") or {"rope_type": "default"}),
                },
                "sliding_attention": {
                    "rope_theta": config.local_rope_theta,
                    "rope_type": "default",
                },
            },
        }
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
