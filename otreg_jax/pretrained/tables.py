"""Hugging Face's tensor names to and from the paths of this project's parameters, one table each.

A table lists (name, path, axes): the tensor's name with {layer} for the layer number, the
parameter's path, and the transposition between the two (its own inverse, as every one reverses the
axes). Where a tensor holds several parameters one after another (Phi-3's qkv_proj), each has its
own row. Weights are never changed otherwise.
"""

import re
from typing import NamedTuple

from otreg_jax.models.adapter import AdapterConfig
from otreg_jax.models.block import LLMConfig, shape_config, shape_names
from otreg_jax.models.conformer_encoder import ConformerEncoderConfig
from otreg_jax.models.encoders import EncoderConfig
from otreg_jax.models.speech_encoder import SpeechEncoderConfig
from otreg_jax.models.waveform_encoder import WaveformEncoderConfig

KEEP = None
MATRIX = (1, 0)  # torch stores Linear weights [out, in]
CONV = (2, 1, 0)  # and Conv1d weights [out, in, width]
PLANE = (3, 2, 1, 0)  # and Conv2d weights [out, in, height, width]


class Part(NamedTuple):
    """Where a parameter lies along the first axis of a tensor of `total` rows."""

    start: int
    stop: int
    total: int


class Row(NamedTuple):
    """layers: the numbers of the layers that a stacked parameter holds; None: all of them."""

    name: str
    path: str
    axes: tuple[int, ...] | None
    part: Part | None = None
    layers: tuple[int, ...] | None = None


class Table(NamedTuple):
    """rows: as above. read: (what names begin with as we write them, a regex of what files have in
    its place), the first that fits. ignored: regexes of tensors that are not ours to load; named:
    those among them that one line names.
    """

    rows: tuple[Row, ...]
    read: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    named: str = ""


# The parts of a whole speech LLM, as their tensors begin: published files and transformers' own.
_ENCODER = r"(model\.)?(audio_tower\.(model\.)?)?(encoder\.)?"
_ADAPTER = r"(model\.)?multi_modal_projector\."
_LLM = r"(model|language_model\.model|model\.language_model)\."
_LANGUAGE = r"(model\.)?language_model\..*|lm_head\.weight"  # what the others leave alone
_PREFIXES = {"encoder": "audio_tower.", "adapter": "", "llm": "language_model."}


def whole(parts: dict[str, Table]) -> Table:
    """One table, to write a speech LLM by, of those of its "encoder", "adapter" and "llm"."""
    rows = tuple(
        row._replace(name=_PREFIXES[part] + row.name, path=f"{part}/{row.path}")
        for part, table in parts.items()
        for row in table.rows
    )
    return Table(rows, (), ())


# --- LLM tensors -------------------------------------------------------------


def llm_table(config: LLMConfig) -> Table:
    """The tensors of an LLM of one of `families.FAMILIES`."""
    rows = [
        Row("model.embed_tokens.weight", "embed/embedding", KEEP),
        Row("model.norm.weight", "norm/scale", KEEP),
    ]
    # It may lie inside a model of text and images or speech, beside heads for several tokens.
    others = "vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector|visual|mtp"
    ignored = [
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        rf"(model\.)?({others})\..*",
    ]
    if config.tied_head:
        ignored.append(r"(language_model\.)?lm_head\.weight")
    else:
        rows.append(Row("lm_head.weight", "head/kernel", MATRIX))
    if names := shape_names(config):
        for shape in sorted(set(names)):
            numbers = tuple(i for i, name in enumerate(names) if name == shape)
            rows += _layer_rows(shape_config(config, shape), f"layers/{shape}", numbers)
    else:
        rows += _layer_rows(config, "layers", None)
    read = (("model.", _LLM), ("lm_head.", r"(language_model\.)?lm_head\."))
    return Table(tuple(rows), read, tuple(ignored))


def _layer_rows(config: LLMConfig, at: str, numbers: tuple[int, ...] | None) -> list[Row]:
    """The tensors of layers of one shape, whose parameters lie below the path `at`."""
    rows, layer = [], "model.layers.{layer}"
    if config.delta:
        rows += [Row(f"{layer}.linear_attn.{t}", f"{at}/delta/{o}", axes) for t, o, axes in _DELTA]
    biased = dict.fromkeys("qkv", config.qkv_bias) | {"o": config.out_bias}
    for theirs, ours, names in _dense(config):
        sizes = [_width(config, name) for name in names]
        for i, name in enumerate(names):
            source, target = f"{layer}.{theirs}_proj", f"{at}/{ours}/{name}"
            part = Part(sum(sizes[:i]), sum(sizes[: i + 1]), sum(sizes)) if names[1:] else None
            rows.append(Row(f"{source}.weight", f"{target}/kernel", MATRIX, part))
            if biased.get(name, config.mlp_bias):
                rows.append(Row(f"{source}.bias", f"{target}/bias", KEEP, part))
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms = {
            "attn_norm": "input_layernorm",
            "attn_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    if not config.pre_norms:
        norms = {
            "attn_post_norm": "post_attention_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm and not config.delta:
        norms |= {"attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"}
    rows += [
        Row(f"{layer}.{theirs}.weight", f"{at}/{ours}/scale", KEEP)
        for ours, theirs in norms.items()
    ]
    if config.layer_scalar:
        rows.append(Row(f"{layer}.layer_scalar", f"{at}/scalar", KEEP))
    return [row._replace(layers=numbers) for row in rows]


def _dense(config: LLMConfig) -> list[tuple[str, str, tuple[str, ...]]]:
    """(tensor's name, our module, which of its layers the tensor holds), of each in turn."""
    if config.family == "phi3":
        fused = [("self_attn.qkv", "attn", ("q", "k", "v")), ("mlp.gate_up", "mlp", ("gate", "up"))]
        return [*fused, ("self_attn.o", "attn", ("o",)), ("mlp.down", "mlp", ("down",))]
    heads = "" if config.delta else "qko" if config.value_is_key else "qkvo"
    attn = [(f"self_attn.{name}", "attn", (name,)) for name in heads]
    return attn + [(f"mlp.{name}", "mlp", (name,)) for name in ("gate", "up", "down")]


_DELTA = (
    ("in_proj_qkv.weight", "qkv/kernel", MATRIX),
    ("in_proj_z.weight", "gate/kernel", MATRIX),
    ("in_proj_b.weight", "beta/kernel", MATRIX),
    ("in_proj_a.weight", "decay/kernel", MATRIX),
    ("out_proj.weight", "o/kernel", MATRIX),
    ("conv1d.weight", "conv", CONV),
    ("A_log", "rate", KEEP),
    ("dt_bias", "rate_bias", KEEP),
    ("norm.weight", "norm/scale", KEEP),
)


def _width(config: LLMConfig, name: str) -> int:
    """Outputs of one of the layers that a tensor may hold several of."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    return heads[name] * config.head_dim if name in heads else config.mlp_dim


# --- Speech encoder ----------------------------------------------------------


def speech_encoder_table(config: EncoderConfig) -> Table:
    """The tensors of a speech encoder, alone or inside a larger model."""
    if isinstance(config, WaveformEncoderConfig):
        return _waveform_table(config)
    if isinstance(config, ConformerEncoderConfig):
        return _conformer_table(config)
    return _whisper_table(config)


def _whisper_table(config: SpeechEncoderConfig) -> Table:
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
    ignored = (
        r"(audio_tower\.)?((model\.)?decoder\..*|proj_out\.weight)",
        rf"{_ADAPTER}.*",
        _LANGUAGE,
    )
    return Table(tuple(rows), (("", _ENCODER),), ignored)


# What models that were trained further stand on the encoder, and what only pretraining uses.
_HEADS = r"(lm_head|classifier|projector|tdnn|objective|quantizer|project_hid|project_q)\..*"
_HEADS += r"|layer_weights|feature_extractor\.(weight|bias)"
_HEADS += r"|(ctc_head|decoder|encoder_projector|joint)\..*"  # Parakeet's


def _waveform_table(config: WaveformEncoderConfig) -> Table:
    """The tensors of wav2vec 2.0, HuBERT or WavLM, alone or below a head."""
    prefix = rf"({config.family}\.)?"
    weight = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    old = r"(parametrizations\.weight\.original{}|weight_{})"  # of PyTorch 1
    rows = [
        Row("feature_projection.projection.weight", "projection/kernel", MATRIX),
        Row("feature_projection.projection.bias", "projection/bias", KEEP),
        Row(f"{weight}0", "positions/weight_g", CONV),
        Row(f"{weight}1", "positions/weight_v", CONV),
        Row("encoder.pos_conv_embed.conv.bias", "positions/bias", KEEP),
    ]
    norms = {"norm": "encoder.layer_norm"}
    if config.projection_norm:
        norms["projection_norm"] = "feature_projection.layer_norm"
    for i in range(len(config.conv_widths)):
        layer = f"feature_extractor.conv_layers.{i}"
        rows.append(Row(f"{layer}.conv.weight", f"conv{i + 1}/kernel", CONV))
        if config.conv_bias:
            rows.append(Row(f"{layer}.conv.bias", f"conv{i + 1}/bias", KEEP))
        if i == 0 or config.conv_norm == "layer":
            norms[f"conv{i + 1}_norm"] = f"{layer}.layer_norm"
    layer = "encoder.layers.{layer}"
    dense = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    dense = {f"attn/{ours}": f"attention.{theirs}" for ours, theirs in dense.items()}
    dense |= {"mlp/up": "feed_forward.intermediate_dense", "mlp/down": "feed_forward.output_dense"}
    if config.relative:
        dense["relative_gate/linear"] = "attention.gru_rel_pos_linear"
        const = "attention.gru_rel_pos_const"
        rows.append(Row(f"{layer}.{const}", "layers/relative_gate/const", KEEP))
        table = "encoder.layers.0.attention.rel_attn_embed.weight"  # the first's, for all of them
        rows.append(Row(table, "relative/embedding", KEEP))
    for ours, theirs in dense.items():
        rows.append(Row(f"{layer}.{theirs}.weight", f"layers/{ours}/kernel", MATRIX))
        rows.append(Row(f"{layer}.{theirs}.bias", f"layers/{ours}/bias", KEEP))
    norms["layers/attn_norm"] = f"{layer}.layer_norm"
    norms["layers/mlp_norm"] = f"{layer}.final_layer_norm"
    for ours, theirs in norms.items():
        rows.append(Row(f"{theirs}.weight", f"{ours}/scale", KEEP))
        rows.append(Row(f"{theirs}.bias", f"{ours}/bias", KEEP))
    read = [
        (f"{weight}{i}", prefix + r"encoder\.pos_conv_embed\.conv\." + old.format(i, "gv"[i]))
        for i in (0, 1)
    ]
    ignored = (prefix + "masked_spec_embed", _HEADS)
    return Table(tuple(rows), (*read, ("", prefix)), ignored, named=_HEADS)


# What the parts of a conformer block are called in files; a convolution or a dense layer is a
# kernel, and a bias if the block's convolutions, or its dense layers, have one.
_BLOCKS = {
    "wav2vec2-bert": {
        "mlp1/up": "ffn1.intermediate_dense",
        "mlp1/down": "ffn1.output_dense",
        "mlp2/up": "ffn2.intermediate_dense",
        "mlp2/down": "ffn2.output_dense",
        **{f"attn/{name}": f"self_attn.linear_{name}" for name in "qkv"},
        "attn/o": "self_attn.linear_out",
        "attn/distance/embedding": "self_attn.distance_embedding.weight",
        "conv_in": "conv_module.pointwise_conv1",
        "depthwise": "conv_module.depthwise_conv",
        "conv_out": "conv_module.pointwise_conv2",
        "mlp1_norm": "ffn1_layer_norm",
        "attn_norm": "self_attn_layer_norm",
        "conv_norm": "conv_module.layer_norm",
        "depthwise_norm": "conv_module.depthwise_layer_norm",
        "mlp2_norm": "ffn2_layer_norm",
        "norm": "final_layer_norm",
    },
    "parakeet_encoder": {
        "mlp1/up": "feed_forward1.linear1",
        "mlp1/down": "feed_forward1.linear2",
        "mlp2/up": "feed_forward2.linear1",
        "mlp2/down": "feed_forward2.linear2",
        **{f"attn/{name}": f"self_attn.{name}_proj" for name in "qkvo"},
        "attn/relative/kernel": "self_attn.relative_k_proj.weight",
        "attn/content_bias": "self_attn.bias_u",
        "attn/position_bias": "self_attn.bias_v",
        "conv_in": "conv.pointwise_conv1",
        "depthwise": "conv.depthwise_conv",
        "conv_out": "conv.pointwise_conv2",
        "mlp1_norm": "norm_feed_forward1",
        "attn_norm": "norm_self_att",
        "conv_norm": "norm_conv",
        "depthwise_norm": "conv.norm",
        "depthwise_norm/mean": "conv.norm.running_mean",
        "depthwise_norm/variance": "conv.norm.running_var",
        "mlp2_norm": "norm_feed_forward2",
        "norm": "norm_out",
    },
}


def _conformer_table(config: ConformerEncoderConfig) -> Table:
    """The tensors of w2v-BERT 2.0 or Parakeet's encoder, alone or below a head."""
    rows = []

    def add(theirs: str, ours: str, axes, has_bias: bool = True) -> None:
        weight = "scale" if ours.endswith("norm") else "kernel"
        rows.append(Row(f"{theirs}.weight", f"{ours}/{weight}", axes))
        if has_bias:
            rows.append(Row(f"{theirs}.bias", f"{ours}/bias", KEEP))

    if config.stack:
        read, layer = r"(wav2vec2_bert\.)?", "encoder.layers.{layer}"
        add("feature_projection.layer_norm", "projection_norm", KEEP)
        add("feature_projection.projection", "projection", MATRIX)
    else:
        read, layer = r"(encoder\.)?", "layers.{layer}"
        add("subsampling.layers.0", "conv1", PLANE)
        for i in range(2, config.subsampling[0] + 1):
            at = 3 * i - 4  # a ReLU stands between them
            add(f"subsampling.layers.{at}", f"depthwise{i}", PLANE)
            add(f"subsampling.layers.{at + 1}", f"pointwise{i}", PLANE)
        add("subsampling.linear", "projection", MATRIX)
    for ours, theirs in _BLOCKS[config.family].items():
        theirs, ours = f"{layer}.{theirs}", f"layers/{ours}"
        if ours.endswith(("/kernel", "/embedding", "_bias", "/mean", "/variance")):
            rows.append(Row(theirs, ours, MATRIX if ours.endswith("/kernel") else KEEP))
        elif ours.endswith("norm"):
            add(theirs, ours, KEEP)
        elif "/conv_" in ours or ours.endswith("/depthwise"):
            add(theirs, ours, CONV, config.conv_bias)
        else:
            add(theirs, ours, MATRIX, config.dense_bias)
    ignored = (read + "masked_spec_embed", r".*\.num_batches_tracked", _HEADS)
    return Table(tuple(rows), (("", read),), ignored, named=_HEADS)


# --- Adapter -----------------------------------------------------------------


def adapter_table(config: AdapterConfig) -> Table:
    """The tensors of the projector of one of `layouts.LAYOUTS`."""
    names = {
        "linear": {"out/kernel": "linear.weight", "out/bias": "linear.bias"},
        "voxtral": {"in/kernel": "linear_1.weight", "out/kernel": "linear_2.weight"},
        "ultravox": {
            "in_norm/scale": "ln_pre.weight",
            "in/kernel": "linear_1.weight",
            "mid_norm/scale": "ln_mid.weight",
            "out/kernel": "linear_2.weight",
        },
    }[config.kind]
    if config.late_norm:
        del names["mid_norm/scale"]
        names["out_norm/scale"] = "ln_post.weight"
    rows = tuple(
        Row(f"multi_modal_projector.{name}", path, MATRIX if path.endswith("kernel") else KEEP)
        for path, name in names.items()
    )
    read = (("multi_modal_projector.", _ADAPTER),)
    return Table(rows, read, (r"(model\.)?audio_tower\..*", _LANGUAGE))


def name_pattern(table: Table, row: Row) -> re.Pattern:
    """The regex of a row's tensor names in files; its group `layer` is the layer number."""
    written, read = next(pair for pair in table.read if row.name.startswith(pair[0]))
    rest = re.escape(row.name.removeprefix(written))
    return re.compile(read + rest.replace(re.escape("{layer}"), r"(?P<layer>\d+)"))
