"""What a config.json may hold: which keys, and which values, before anything is computed from them.

Published files carry keys of trainers, converters and other libraries. Those that change nothing
are passed over; those that may change what a model computes are refused.
"""

import functools
import re
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging

# Keys that do not change what an LLM computes at inference, found in published files.
_HARMLESS = frozenset(
    """_attn_implementation _attn_implementation_autoset _model_name_or_path _name_or_path
    _sliding_window_pattern architectures attention_dropout auto_map bos_token_id
    cache_implementation chunk_size_feed_forward classifier_dropout dtype embd_pdrop
    eos_token_id hidden_dropout id2label initializer_range label2id max_position_embeddings
    model_type output_attentions output_hidden_states pad_token_id pretraining_tp problem_type
    resid_pdrop return_dict tokenizer_class torch_dtype transformers_version unk_token_id
    unsloth_fixed unsloth_version use_cache""".split()
)
# What may change what is computed, by the words in its name.
_MATHEMATICAL = re.compile(
    r"rope|rotary|window|alibi|causal|bidirectional|cross_attention|encoder_decoder|layer_types"
    r"|per_layer|chunk_size|parallel_(attn|block|residual)|position_embedding|softcap|multiplier"
    r"|bias$|_scale$|_scaling|scalar|norm|hidden_act|expert|moe|quant|compress|spars|pruned"
    r"|full_attention|k_eq_v|kv_shared|output_gate|linear_|global_|double_wide"
)
_OFF = (None, False, 0, {}, [], "")  # values of an unknown key that cannot change anything


class Check(NamedTuple):
    """What a value must be, and how that is said."""

    holds: Callable[[Any], bool]
    words: str


def whole(most: int) -> Check:
    """A whole number from 1 to `most`."""
    return Check(lambda v: type(v) is int and 1 <= v <= most, f"a whole number, 1 to {most:,}")


def or_null(check: Check) -> Check:
    return Check(lambda v: v is None or check.holds(v), f"{check.words}, or null")


NUMBER = Check(lambda v: type(v) in (int, float) and 0 < v < 1e15, "a number above 0, below 1e15")
FLAG = Check(lambda v: type(v) is bool, "true or false")
TEXT = Check(lambda v: type(v) is str, "a string")
OBJECT = Check(lambda v: type(v) is dict, "an object of keys and values")
_STRINGS = Check(
    lambda v: type(v) is list and all(type(item) is str for item in v), "a list of strings"
)
_NUMBERS = Check(
    lambda v: type(v) is list and all(map(NUMBER.holds, v)), "a list of numbers above 0"
)
_LENGTH = whole(2**31)

# Bounds are far above any model there is: they keep a slip of the pen from becoming memory.
LLM = {
    "vocab_size": whole(2**24),
    "hidden_size": whole(2**17),
    "intermediate_size": whole(2**20),
    "num_hidden_layers": whole(2**12),
    "num_attention_heads": whole(2**12),
    "num_key_value_heads": or_null(whole(2**12)),
    "head_dim": or_null(whole(2**13)),
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "rms_norm_eps": NUMBER,
    "tie_word_embeddings": FLAG,
    "rope_theta": NUMBER,
    "rope_local_base_freq": NUMBER,
    "rope_scaling": or_null(OBJECT),
    "rope_parameters": or_null(OBJECT),
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "use_sliding_window": FLAG,
    "use_bidirectional_attention": Check(
        lambda v: v is None or type(v) in (bool, str), "true, false, a string, or null"
    ),
    "full_attention_interval": whole(2**12),
    "attn_output_gate": FLAG,
    "linear_conv_kernel_dim": whole(2**10),
    "linear_key_head_dim": whole(2**13),
    "linear_value_head_dim": whole(2**13),
    "linear_num_key_heads": whole(2**12),
    "linear_num_value_heads": whole(2**12),
    "global_head_dim": whole(2**13),
    "num_global_key_value_heads": or_null(whole(2**12)),
    "per_layer_config": or_null(OBJECT),
    "attention_k_eq_v": FLAG,
    "enable_moe_block": FLAG,
    "sliding_window": or_null(_LENGTH),
    "sliding_window_size": or_null(_LENGTH),
    "sliding_window_pattern": whole(2**12),
    "max_window_layers": Check(lambda v: type(v) is int and v >= 0, "a whole number from 0"),
    "layer_types": or_null(_STRINGS),
    "query_pre_attn_scalar": NUMBER,
    "attn_logit_softcapping": or_null(NUMBER),
    "final_logit_softcapping": or_null(NUMBER),
    "max_position_embeddings": _LENGTH,
    "original_max_position_embeddings": _LENGTH,
    "partial_rotary_factor": NUMBER,
    "embedding_multiplier": NUMBER,
    "attention_multiplier": NUMBER,
    "residual_multiplier": NUMBER,
    "logits_scaling": NUMBER,
    "no_rope_layers": or_null(
        Check(lambda v: type(v) is list and all(x in (0, 1) for x in v), "a list of 0 and 1")
    ),
    "no_rope_layer_interval": whole(2**12),
}
ROPE = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": NUMBER,
    "factor": NUMBER,
    "low_freq_factor": NUMBER,
    "high_freq_factor": NUMBER,
    "original_max_position_embeddings": _LENGTH,
    "attention_factor": NUMBER,
    "beta_fast": NUMBER,
    "beta_slow": NUMBER,
    "mscale": Check(lambda v: v == 0 or NUMBER.holds(v), NUMBER.words),
    "mscale_all_dim": Check(lambda v: v == 0 or NUMBER.holds(v), NUMBER.words),
    "truncate": FLAG,
    "llama_4_scaling_beta": Check(lambda v: v == 0 or NUMBER.holds(v), NUMBER.words),
    "max_position_embeddings": _LENGTH,
    "partial_rotary_factor": NUMBER,
    "short_factor": _NUMBERS,
    "long_factor": _NUMBERS,
}
_SIZES = Check(
    lambda v: type(v) is list and v and all(type(s) is int and 1 <= s <= 2**13 for s in v),
    "a list of whole numbers, 1 to 8,192",
)
_BLOCKS = {  # of every encoder that reads the waveform
    "hidden_size": whole(2**13),
    "num_hidden_layers": whole(2**12),
    "num_attention_heads": whole(2**12),
    "intermediate_size": whole(2**18),
    "hidden_act": TEXT,
    "layer_norm_eps": NUMBER,
}
WAVEFORM_ENCODER = _BLOCKS | {
    "feat_extract_norm": TEXT,
    "feat_extract_activation": TEXT,
    "feat_proj_layer_norm": FLAG,
    "conv_dim": _SIZES,
    "conv_kernel": _SIZES,
    "conv_stride": _SIZES,
    "conv_bias": FLAG,
    "num_conv_pos_embeddings": whole(2**12),
    "num_conv_pos_embedding_groups": whole(2**12),
    "do_stable_layer_norm": FLAG,
    "num_buckets": whole(2**14),
    "max_bucket_distance": whole(2**14),
}
CONFORMER_ENCODER = _BLOCKS | {
    "feature_projection_input_dim": whole(2**13),
    "left_max_position_embeddings": whole(2**14),
    "right_max_position_embeddings": whole(2**14),
    "conv_depthwise_kernel_size": whole(2**10),
    "attention_bias": FLAG,
    "convolution_bias": FLAG,
    "conv_kernel_size": whole(2**10),
    "subsampling_factor": whole(2**10),
    "subsampling_conv_channels": whole(2**13),
    "num_mel_bins": whole(2**10),
    "scale_input": FLAG,
}
SPEECH_ENCODER = {
    "d_model": whole(2**13),
    "encoder_layers": whole(2**12),
    "encoder_attention_heads": whole(2**12),
    "encoder_ffn_dim": whole(2**18),
    "num_mel_bins": whole(2**10),
    "max_source_positions": whole(2**14),
    "activation_function": TEXT,
    "pool": whole(64),
    "strides": Check(
        lambda v: type(v) is list and v and all(type(s) is int and 1 <= s <= 64 for s in v),
        "a list of whole numbers, 1 to 64",
    ),
}


def wrong_values(values: dict[str, Any], checks: dict[str, Check]) -> list[str]:
    """A problem for each value that is not what its check asks; keys without a check are free."""
    return [
        f"{key} is {reprlib.repr(value)}, not {checks[key].words}"
        for key, value in values.items()
        if key in checks and not checks[key].holds(value)
    ]


def indivisible(key: str, size: int, heads: int) -> list[str]:
    """A problem if `heads` heads cannot share `size`."""
    return [f"{key}={size} does not divide among {heads} heads"] if size % heads else []


def refused_keys(raw: dict[str, Any], known) -> list[str]:
    """A problem for each key that is not `known` and may change what is computed."""
    problems = quantised(raw)
    for key, value in _unknown(raw, known).items():
        if key != "quantization_config" and _MATHEMATICAL.search(key):
            problems.append(
                f"unknown key {key!r} = {reprlib.repr(value)}: it may change what the model "
                "computes; remove it if it does not"
            )
    return problems


def quantised(raw: dict[str, Any]) -> list[str]:
    """A problem if config.json says that the weights are quantised."""
    said = raw.get("quantization_config")
    if said in _OFF:
        return []
    method = said.get("quant_method") if type(said) is dict else said
    return [
        f"quantization_config: the weights are quantised ({reprlib.repr(method)}; neither "
        "bitsandbytes nor GPTQ, AWQ or FP8 is read): take the model they were made from"
    ]


def name_passed_over(raw: dict[str, Any], known, where: str) -> None:
    """Names the keys that are passed over, in one warning, once."""
    if unknown := _unknown(raw, known):
        _warn_once(f"{where}: passed over, nothing is computed from them: {', '.join(unknown)}")


def _unknown(raw: dict[str, Any], known) -> dict[str, Any]:
    return {
        key: value
        for key, value in sorted(raw.items())
        if key not in known and key not in _HARMLESS and value not in _OFF
    }


@functools.cache
def _warn_once(line: str) -> None:
    logging.warning("%s", line)


def parsed(raw: Any, where: str) -> dict[str, Any]:
    """`raw` if it is an object of keys and values, else ValueError."""
    if not OBJECT.holds(raw):
        raise ValueError(f"{where}: is {reprlib.repr(raw)}, not {OBJECT.words}")
    return raw


def raise_all(problems: list[str], where: str) -> None:
    """One ValueError of all problems, if there are any."""
    if problems:
        raise ValueError(f"{where}:\n  " + "\n  ".join(problems))
