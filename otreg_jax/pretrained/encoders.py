"""config.json of speech encoders to and from their configurations; checks as in `configs`."""

from typing import Any

from otreg_jax.models.encoders import EncoderConfig
from otreg_jax.models.speech_encoder import SpeechEncoderConfig
from otreg_jax.pretrained import checks, layouts, waveform
from otreg_jax.pretrained.configs import ACTIVATION_NAMES, ACTIVATIONS

_WHISPER = {  # the defaults of its class in transformers
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "activation_function": "gelu",
}
_WHISPER_LARGE = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
}
_STRIDES = (1, 2)
_OWN = "otreg_speech_encoder"  # what Whisper's architecture cannot say: other strides, a pool
# What each `model_type` is when config.json leaves a key out.
_DEFAULTS = {
    "whisper": _WHISPER,
    "voxtral_encoder": _WHISPER | _WHISPER_LARGE,
    "qwen2_audio_encoder": _WHISPER | _WHISPER_LARGE | {"pool": 2},
    _OWN: _WHISPER | {"strides": None, "pool": 1},
}
# Voxtral's keys as Whisper calls them.
_NAMES = {theirs: ours for ours, theirs in layouts.VOXTRAL_KEYS.items()}


def speech_encoder_config(
    raw: dict[str, Any], where: str = "config.json", preprocessor: Any = None
) -> EncoderConfig:
    """The configuration of the encoder that a parsed config.json describes, or that is inside what
    it describes. `preprocessor`: the parsed preprocessor_config.json, if there is one.

    Raises ValueError, listing every problem, for any other architecture or a wrong value.
    """
    raw = checks.parsed(raw, where)
    if layouts.name(raw):
        raw = layouts.audio_part(raw, where)
    kind = str(raw.get("model_type"))
    if kind in waveform.KINDS:
        preprocessor = checks.parsed(preprocessor or {}, "preprocessor_config.json")
        return waveform.encoder_config(raw, where, preprocessor)
    if kind not in _DEFAULTS:
        kinds = (*_DEFAULTS, *waveform.KINDS, *layouts.LAYOUTS)
        known = ", ".join(kind for kind in kinds if kind != _OWN)
        raise ValueError(f"{where}: model_type {kind!r} is no speech encoder; supported: {known}")
    names = _NAMES if kind == "voxtral_encoder" else {}
    said = {names.get(key, key): value for key, value in raw.items()}
    c = _DEFAULTS[kind] | {key: said[key] for key in _DEFAULTS[kind] if key in said}
    problems = checks.quantised(raw) + checks.wrong_values(c, checks.SPEECH_ENCODER)
    checks.raise_all(problems, where)
    problems += checks.indivisible("d_model", c["d_model"], c["encoder_attention_heads"])
    if c["d_model"] % 2 or c["d_model"] < 4:
        problems.append(f"d_model={c['d_model']} is not even, or below 4: no position table")
    if c["activation_function"] not in ACTIVATIONS:
        problems.append(f"activation_function {c['activation_function']!r} is not supported")
    checks.raise_all(problems, where)
    return SpeechEncoderConfig(
        embed_dim=c["d_model"],
        num_layers=c["encoder_layers"],
        num_heads=c["encoder_attention_heads"],
        mlp_dim=c["encoder_ffn_dim"],
        num_mels=c["num_mel_bins"],
        max_positions=c["max_source_positions"],
        strides=tuple(c.get("strides", _STRIDES)),
        pool=c.get("pool", 1),
        reads_padding=kind == "qwen2_audio_encoder",
        activation=ACTIVATIONS[c["activation_function"]],
    )


def speech_encoder_config_json(config: EncoderConfig) -> dict[str, Any]:
    """The config.json of a speech encoder: that of the class it came from. A Whisper encoder of
    other strides than Whisper's, or that pools, has one of our own."""
    if not isinstance(config, SpeechEncoderConfig):
        return waveform.encoder_config_json(config)
    raw = {
        "architectures": ["WhisperEncoder"],
        "model_type": "whisper",
        "d_model": config.embed_dim,
        "encoder_layers": config.num_layers,
        "encoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.mlp_dim,
        "num_mel_bins": config.num_mels,
        "max_source_positions": config.max_positions,
        "activation_function": ACTIVATION_NAMES[config.activation],
    }
    if config.strides != _STRIDES or config.pool > 1:
        own = {"architectures": [], "model_type": _OWN, "strides": list(config.strides)}
        raw |= own | ({"pool": config.pool} if config.pool > 1 else {})
    return raw


def preprocessor_json(config: EncoderConfig) -> dict[str, Any] | None:
    """The preprocessor_config.json of an encoder that is read with it, else None."""
    if isinstance(config, SpeechEncoderConfig):
        return None
    return waveform.preprocessor_json(config)
