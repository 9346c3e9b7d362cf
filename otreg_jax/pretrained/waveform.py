"""config.json and preprocessor_config.json of speech encoders that read the waveform, to and from
their configurations; checks as in `configs`."""

from typing import Any

from otreg_jax.data.utterances import SAMPLE_RATE
from otreg_jax.models.conformer_encoder import ConformerEncoderConfig
from otreg_jax.models.waveform_encoder import WaveformEncoderConfig
from otreg_jax.pretrained import checks
from otreg_jax.pretrained.configs import ACTIVATION_NAMES, ACTIVATIONS

_WAV2VEC2 = {  # the defaults of its class; the others have those of its keys that theirs have
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
}
_ADAPTERS = {"add_adapter": False, "adapter_attn_dim": None}
_WAVEFORM = {
    "wav2vec2": _WAV2VEC2 | _ADAPTERS,
    "hubert": _WAV2VEC2
    | {"feat_proj_layer_norm": True, "conv_pos_batch_norm": False, "adapter_attn_dim": None},
    "wavlm": _WAV2VEC2 | _ADAPTERS | {"num_buckets": 320, "max_bucket_distance": 800},
}
_CONFORMER = {
    "wav2vec2-bert": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "hidden_act": "swish",
        "layer_norm_eps": 1e-5,
        "feature_projection_input_dim": 160,
        "position_embeddings_type": "relative_key",
        "left_max_position_embeddings": 64,
        "right_max_position_embeddings": 8,
        "conv_depthwise_kernel_size": 31,
        "add_adapter": False,
        "use_intermediate_ffn_before_adapter": False,
    },
    "parakeet_encoder": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "intermediate_size": 4096,
        "hidden_act": "silu",
        "attention_bias": True,
        "convolution_bias": True,
        "conv_kernel_size": 9,
        "subsampling_factor": 8,
        "subsampling_conv_channels": 256,
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
        "num_mel_bins": 80,
        "scale_input": True,
    },
}
_PARAKEETS = ("parakeet_ctc", "parakeet_rnnt", "parakeet_tdt")  # heads on its encoder
KINDS = (*_WAVEFORM, *_CONFORMER, *_PARAKEETS)  # of `model_type`
# What preprocessor_config.json says of the filter bank that is computed, where it says it.
_BANKS = {
    "wav2vec2-bert": {"sampling_rate": SAMPLE_RATE},
    "parakeet_encoder": {
        "sampling_rate": SAMPLE_RATE,
        "hop_length": 160,
        "n_fft": 512,
        "win_length": 400,
        "preemphasis": 0.97,
    },
}
# Keys of theirs that training, pretraining and heads are made by.
_UNUSED = """
    activation_dropout adapter_act adapter_kernel_size adapter_stride apply_spec_augment
    attention_dropout classifier_proj_size codevector_dim conformer_conv_dropout
    contrastive_logits_temperature ctc_loss_reduction ctc_zero_infinity diversity_loss_weight
    dropout dropout_positions feat_extract_dropout feat_proj_dropout feat_quantizer_dropout
    final_dropout gradient_checkpointing hidden_dropout_prob layerdrop mask_channel_length
    mask_channel_min_space mask_channel_other mask_channel_prob mask_channel_selection
    mask_feature_length mask_feature_min_masks mask_feature_prob mask_time_length
    mask_time_min_masks mask_time_min_space mask_time_other mask_time_prob mask_time_selection
    max_source_positions no_mask_channel_overlap no_mask_time_overlap num_adapter_layers
    num_codevector_groups num_codevectors_per_group num_ctc_classes num_feat_extract_layers
    num_key_value_heads num_negatives output_hidden_size proj_codevector_dim
    rotary_embedding_base tdnn_dilation tdnn_dim tdnn_kernel use_weighted_layer_sum vocab_size
    xvector_output_dim""".split()


def encoder_config(
    raw: dict[str, Any], where: str, preprocessor: dict[str, Any]
) -> WaveformEncoderConfig | ConformerEncoderConfig:
    """The configuration that a parsed config.json of one of KINDS and its preprocessor_config.json
    describe. Raises ValueError, listing every problem."""
    if raw["model_type"] in _PARAKEETS:
        inside = raw.get("encoder_config")
        inside = checks.parsed({} if inside is None else inside, f"{where}: encoder_config")
        stored = {key: raw[key] for key in ("quantization_config",) if key in raw}  # of all weights
        raw = stored | inside | {"model_type": "parakeet_encoder"}
    read = _waveform_config if raw["model_type"] in _WAVEFORM else _conformer_config
    return read(raw, where, preprocessor)


def _given(raw: dict[str, Any], defaults: dict[str, Any], known: dict[str, checks.Check]):
    """The values of the keys in `defaults`, and a problem for each key or value that is refused."""
    c = defaults | {key: value for key, value in raw.items() if key in defaults}
    problems = checks.refused_keys(raw, {*defaults, *_UNUSED})
    return c, problems + checks.wrong_values(c, known)


def _blocks(c: dict[str, Any]) -> dict[str, Any]:
    """What both configurations call alike."""
    return dict(
        embed_dim=c["hidden_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        activation=ACTIVATIONS[c["hidden_act"]],
    )


def _waveform_config(
    raw: dict[str, Any], where: str, preprocessor: dict[str, Any]
) -> WaveformEncoderConfig:
    """Of wav2vec 2.0, HuBERT or WavLM."""
    family = raw["model_type"]
    where = f"{where} ({family})"
    defaults = _WAVEFORM[family]
    c, problems = _given(raw, defaults, checks.WAVEFORM_ENCODER)
    checks.raise_all(problems, where)  # what follows computes with the values
    heads, groups = c["num_attention_heads"], c["num_conv_pos_embedding_groups"]
    problems += checks.indivisible("hidden_size", c["hidden_size"], heads)
    if c["hidden_size"] % groups:
        problems.append(
            f"num_conv_pos_embedding_groups={groups} does not divide hidden_size={c['hidden_size']}"
        )
    shapes = [c[f"conv_{name}"] for name in ("dim", "kernel", "stride")]
    if len({len(shape) for shape in shapes}) > 1:
        problems.append("conv_dim, conv_kernel, conv_stride: not as long as one another")
    problems += [
        f"{key} {c[key]!r} is not supported"
        for key in ("hidden_act", "feat_extract_activation")
        if c[key] not in ACTIVATIONS
    ]
    if c["feat_extract_norm"] not in ("group", "layer"):
        problems.append(f"feat_extract_norm {c['feat_extract_norm']!r} is not group or layer")
    if c["layer_norm_eps"] != 1e-5:
        problems.append(f"layer_norm_eps={c['layer_norm_eps']}: only 1e-05 is computed")
    if family == "wavlm" and c["num_buckets"] < 4:
        problems.append(f"num_buckets={c['num_buckets']}: below 4 no distance is its own")
    for key, what in (
        ("add_adapter", "convolutions behind the encoder are"),
        ("adapter_attn_dim", "adapters in its layers (MMS) are"),
        ("conv_pos_batch_norm", "a batch norm of positions is"),
    ):
        if c.get(key) not in (None, False):
            problems.append(f"{key}={c[key]!r}: {what} not computed")
    read = {"do_normalize": True, "sampling_rate": SAMPLE_RATE, "feature_size": 1}
    read |= {key: preprocessor[key] for key in read if key in preprocessor}
    if not checks.FLAG.holds(read["do_normalize"]):
        problems.append(f"preprocessor_config.json: do_normalize is not {checks.FLAG.words}")
    if read["sampling_rate"] != SAMPLE_RATE or read["feature_size"] != 1:
        problems.append(f"preprocessor_config.json: its audio is not mono at {SAMPLE_RATE} Hz")
    checks.raise_all(problems, where)
    checks.name_passed_over(raw, {*defaults, *_UNUSED}, where)
    return WaveformEncoderConfig(
        family=family,
        **_blocks(c),
        conv_widths=tuple(c["conv_dim"]),
        conv_kernels=tuple(c["conv_kernel"]),
        conv_strides=tuple(c["conv_stride"]),
        conv_bias=c["conv_bias"],
        conv_norm=c["feat_extract_norm"],
        conv_activation=ACTIVATIONS[c["feat_extract_activation"]],
        projection_norm=c.get("feat_proj_layer_norm", True),
        position_kernel=c["num_conv_pos_embeddings"],
        position_groups=groups,
        pre_norm=c["do_stable_layer_norm"],
        relative=(c["num_buckets"], c["max_bucket_distance"]) if family == "wavlm" else None,
        normalize=read["do_normalize"],
    )


def _conformer_config(
    raw: dict[str, Any], where: str, preprocessor: dict[str, Any]
) -> ConformerEncoderConfig:
    """Of w2v-BERT 2.0 or Parakeet's encoder."""
    family = raw["model_type"]
    where = f"{where} ({family})"
    defaults = _CONFORMER[family]
    c, problems = _given(raw, defaults, checks.CONFORMER_ENCODER)
    stack = 0
    if family == "wav2vec2-bert":
        stack = preprocessor.get("stride", 2)
        if not checks.whole(64).holds(stack):
            problems.append(f"preprocessor_config.json: stride is not {checks.whole(64).words}")
    checks.raise_all(problems, where)  # what follows computes with the values
    problems += checks.indivisible("hidden_size", c["hidden_size"], c["num_attention_heads"])
    if c["hidden_act"] not in ACTIVATIONS:
        problems.append(f"hidden_act {c['hidden_act']!r} is not supported")
    fixed = {
        "layer_norm_eps": 1e-5,
        "position_embeddings_type": "relative_key",
        "add_adapter": False,
        "use_intermediate_ffn_before_adapter": False,
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
    }
    problems += [
        f"{key}={c[key]!r}: only {value!r} is computed"
        for key, value in fixed.items()
        if key in c and c[key] != value
    ]
    bins = c["feature_projection_input_dim"] // stack if stack else c["num_mel_bins"]
    bank = _BANKS[family] | {"num_mel_bins": bins} if stack else _BANKS[family]
    bank = bank | {"feature_size": bins}
    problems += [
        f"preprocessor_config.json: {key}={preprocessor[key]!r}, not {value!r}"
        for key, value in bank.items()
        if key in preprocessor and preprocessor[key] != value
    ]
    kernel = "conv_depthwise_kernel_size" if stack else "conv_kernel_size"
    if c[kernel] % 2 == 0:
        problems.append(f"{kernel}={c[kernel]} is even")
    how = {"num_mels": bins, "conv_kernel": c[kernel]}
    if stack:
        how |= {"stack": stack, "conv_bias": False, "scale_input": False}
        how["distances"] = (c["left_max_position_embeddings"], c["right_max_position_embeddings"])
        if bins * stack != c["feature_projection_input_dim"]:
            problems.append(f"feature_projection_input_dim is not {stack} times a number of bins")
    else:
        factor = c["subsampling_factor"]
        if factor & (factor - 1) or factor < 2 or bins % factor:
            problems.append(f"subsampling_factor={factor}: not a power of 2 that divides the bins")
        how["subsampling"] = (factor.bit_length() - 1, c["subsampling_conv_channels"])
        how |= {"conv_bias": c["convolution_bias"], "dense_bias": c["attention_bias"]}
        how["scale_input"] = c["scale_input"]
    checks.raise_all(problems, where)
    checks.name_passed_over(raw, {*defaults, *_UNUSED}, where)
    return ConformerEncoderConfig(
        family=family,
        **_blocks(c),
        **how,
    )


def encoder_config_json(config: WaveformEncoderConfig | ConformerEncoderConfig) -> dict[str, Any]:
    """The config.json of an encoder, as the class of its family reads it."""
    is_conformer = isinstance(config, ConformerEncoderConfig)
    return _conformer_json(config) if is_conformer else _waveform_json(config)


def _blocks_json(config: WaveformEncoderConfig | ConformerEncoderConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": ACTIVATION_NAMES[config.activation],
    }


def _waveform_json(config: WaveformEncoderConfig) -> dict[str, Any]:
    names = {"wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel", "wavlm": "WavLMModel"}
    buckets, distance = config.relative or (None, None)
    raw = {
        **_blocks_json(config),
        "feat_extract_norm": config.conv_norm,
        "feat_extract_activation": ACTIVATION_NAMES[config.conv_activation],
        "conv_dim": list(config.conv_widths),
        "conv_kernel": list(config.conv_kernels),
        "conv_stride": list(config.conv_strides),
        "conv_bias": config.conv_bias,
        "num_conv_pos_embeddings": config.position_kernel,
        "num_conv_pos_embedding_groups": config.position_groups,
        "do_stable_layer_norm": config.pre_norm,
        "feat_proj_layer_norm": config.projection_norm,
        "num_buckets": buckets,
        "max_bucket_distance": distance,
    }
    raw = _WAVEFORM[config.family] | raw
    return {
        "architectures": [names[config.family]],
        "model_type": config.family,
        "num_feat_extract_layers": len(config.conv_widths),
        "mask_time_prob": 0.0,  # or the class wants what pretraining puts at masked positions
    } | {key: raw[key] for key in _WAVEFORM[config.family]}


def _conformer_json(config: ConformerEncoderConfig) -> dict[str, Any]:
    before, after = config.distances or (None, None)
    number, channels = config.subsampling
    raw = _CONFORMER[config.family] | {
        **_blocks_json(config),
        "attention_bias": config.dense_bias,
        "convolution_bias": config.conv_bias,
        "conv_kernel_size": config.conv_kernel,
        "conv_depthwise_kernel_size": config.conv_kernel,
        "subsampling_factor": 2**number,
        "subsampling_conv_channels": channels,
        "num_mel_bins": config.num_mels,
        "scale_input": config.scale_input,
        "feature_projection_input_dim": config.num_mels * config.stack,
        "left_max_position_embeddings": before,
        "right_max_position_embeddings": after,
    }
    names = {"wav2vec2-bert": "Wav2Vec2BertModel", "parakeet_encoder": "ParakeetEncoder"}
    return {
        "architectures": [names[config.family]],
        "model_type": config.family,
        "mask_time_prob": 0.0,
    } | {key: raw[key] for key in _CONFORMER[config.family]}


def preprocessor_json(config: WaveformEncoderConfig | ConformerEncoderConfig) -> dict[str, Any]:
    """The preprocessor_config.json of an encoder, as transformers' feature extractors read it."""
    if isinstance(config, ConformerEncoderConfig):
        raw = _BANKS[config.family] | {"feature_size": config.num_mels, "padding_value": 0.0}
        if not config.stack:
            return raw | {"feature_extractor_type": "ParakeetFeatureExtractor"}
        raw |= {"num_mel_bins": config.num_mels, "stride": config.stack}
        return raw | {"feature_extractor_type": "SeamlessM4TFeatureExtractor"}
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "do_normalize": config.normalize,
        "return_attention_mask": config.conv_norm == "layer",
        "padding_side": "right",
        "padding_value": 0.0,
    }
