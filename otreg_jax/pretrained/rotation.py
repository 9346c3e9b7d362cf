"""Rotary positions of config.json, in the old keys and in `rope_parameters`, to and from
`models.rope`; checks as in `configs`."""

import dataclasses
import math
from typing import Any

from otreg_jax.models.rope import RopeScaling
from otreg_jax.pretrained import checks

_SCALING_KEYS = {
    "default": set(),
    "proportional": set(),
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
    "proportional": {"factor", "partial_rotary_factor"},
}


def read(
    family: str, c: dict, head_dim: int, problems: list[str]
) -> tuple[float, RopeScaling | None, float | None, int]:
    """(base, scaling, base of the local layers, dimensions of a head that are turned) from the old
    keys or from `rope_parameters`."""
    rope = c["rope_parameters"] or {}
    local_theta = None
    if family in ("gemma3_text", "gemma4_text"):
        kinds = {kind: rope.get(kind) or {} for kind in ("sliding_attention", "full_attention")}
        if wrong := checks.wrong_values(kinds, dict.fromkeys(kinds, checks.OBJECT)):
            problems += [f"rope_parameters: {problem}" for problem in wrong]
            return c["rope_theta"], None, None, head_dim
        base = c.get("rope_local_base_freq", 10_000.0)
        local_theta, scaled = _scaling(base, kinds["sliding_attention"], problems)
        if scaled is not None:
            problems.append("rope_parameters: scaled rotation of the local layers is not supported")
        rope = kinds["full_attention"]
    if family == "smollm3":
        local_theta = math.inf  # not rotated at all
    rope = {**(c["rope_scaling"] or {}), **rope}
    share = c.get("partial_rotary_factor", 1.0)
    if family in ("phi3", "qwen3_5_text"):
        share = rope.pop("partial_rotary_factor", None) or share
        if not checks.NUMBER.holds(share):
            problems.append(f"partial_rotary_factor is {share!r}, not {checks.NUMBER.words}")
            return c["rope_theta"], None, None, head_dim
        rope = _phi3_rope(rope, c) if family == "phi3" else _of_text(rope)
    theta, scaling = _scaling(c["rope_theta"], rope, problems)
    turned = int(head_dim * share)
    if not 2 <= turned <= head_dim or turned % 2:
        problems.append(f"partial_rotary_factor={share}: {turned} of {head_dim} dimensions turn")
    if scaling and scaling.kind == "proportional" and family != "gemma4_text":
        problems.append("rope type 'proportional' is computed in Gemma 4 only")
    if scaling and scaling.kind == "longrope" and len(scaling.short_factors) != turned // 2:
        problems.append(f"rope type 'longrope': short_factor is not of {turned // 2} numbers")
    return theta, scaling, local_theta, turned


def _of_text(rope: dict) -> dict:
    """Qwen3.5 has a share of the pairs for each axis of an image; a text's positions are the same
    on all of them."""
    return {key: value for key, value in rope.items() if not key.startswith("mrope_")}


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
    if kind == "proportional":
        scaling = dataclasses.replace(scaling, share=rope.get("partial_rotary_factor", 1.0))
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


def scaling_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
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
    if scaling.kind == "proportional":
        raw["partial_rotary_factor"] = scaling.share
    names = {
        "linear": (),
        "proportional": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    return raw | {name: getattr(scaling, name) for name in names[scaling.kind]}
