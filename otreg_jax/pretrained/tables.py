"""Hugging Face's tensor names to and from the paths of this project's parameters, one table each.

A table lists (name, path, axes): the tensor's name with {layer} for the layer number, the
parameter's path, and the transposition between the two (its own inverse, as every one reverses the
axes). Weights are never changed otherwise.
"""

import re
from typing import NamedTuple

from otreg_jax.models.llm import LLMConfig
from otreg_jax.models.speech_encoder import SpeechEncoderConfig

KEEP = None
MATRIX = (1, 0)  # torch stores Linear weights [out, in]
CONV = (2, 1, 0)  # and Conv1d weights [out, in, width]


class Row(NamedTuple):
    name: str
    path: str
    axes: tuple[int, ...] | None


class Table(NamedTuple):
    """rows: as above. written: what names begin with as we write them (not all of them do). read:
    a regex of what files have in its place. ignored: regexes of tensors that are not ours to load.
    """

    rows: tuple[Row, ...]
    written: str
    read: str
    ignored: tuple[str, ...]


# --- LLM tensors -------------------------------------------------------------


def llm_table(config: LLMConfig) -> Table:
    """The tensors of an LLM of one of `configs.FAMILIES`."""
    rows = [
        Row("model.embed_tokens.weight", "embed/embedding", KEEP),
        Row("model.norm.weight", "norm/scale", KEEP),
    ]
    ignored = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
    if config.family == "gemma3_text":  # the LLM may lie inside a model of text and images
        ignored.append(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
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
    read = r"(model|language_model\.model|model\.language_model)\."
    return Table(tuple(rows), "model.", read, tuple(ignored))


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
    return Table(tuple(rows), "", r"(model\.)?(encoder\.)?", ignored)


def name_pattern(table: Table, row: Row) -> re.Pattern:
    """The regex of a row's tensor names in files; its group `layer` is the layer number."""
    begins = row.name.startswith(table.written)
    rest = re.escape(row.name.removeprefix(table.written) if begins else row.name)
    rest = rest.replace(re.escape("{layer}"), r"(?P<layer>\d+)")
    return re.compile((table.read if begins else "") + rest)
