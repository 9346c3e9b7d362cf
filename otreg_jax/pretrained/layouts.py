"""Speech LLMs in one directory, as their servers open them: what config.json says of each layout,
and what a model must be to become one.

| layout | encoder | projector | LLM | audio |
| --- | --- | --- | --- | --- |
| ultravox | Whisper | 8 positions stacked, RMSNorm, SwiGLU | (1) | of any length |
| voxtral | Whisper | 4 positions stacked, two layers | (1, 2) | windows of 30 s, silence included |
| qwen2_audio | Whisper, pairs of positions averaged | one layer | (1, 2) | windows, masked |

(1) any that does not scale what enters it. (2) any that does not change its logits after the head.

Sources: the model classes of `transformers`, and https://github.com/fixie-ai/ultravox.
"""

import math
from typing import Any, NamedTuple

from otreg_jax.models.adapter import AdapterConfig
from otreg_jax.models.encoders import EncoderConfig
from otreg_jax.models.llm import LLMConfig
from otreg_jax.models.speech_encoder import SpeechEncoderConfig
from otreg_jax.pretrained import checks

FRAMES_PER_SECOND = 100  # of mel spectrograms, as all these models have them


class Layout(NamedTuple):
    """architecture: the class in `transformers` or, of ultravox, in its own files. kind: of the
    adapter. audio: `model_type` of the encoder's part of config.json. token: key of the id that
    stands for speech in a prompt, and how published tokenizers write it. window: whether audio is
    padded to all positions of the encoder; masked: whether attention is kept from that silence.
    """

    architecture: str
    kind: str
    audio: str
    token: tuple[str, str]
    window: bool
    masked: bool = False
    pool: int = 1


class Window(NamedTuple):
    """How long audio is made by silence, in seconds (0: not), and whether attention is kept from
    it."""

    seconds: float
    masked: bool


LAYOUTS = {
    "ultravox": Layout(
        "UltravoxModel", "ultravox", "whisper", ("audio_token_index", "<|audio|>"), window=False
    ),
    "voxtral": Layout(
        "VoxtralForConditionalGeneration",
        "voxtral",
        "voxtral_encoder",
        ("audio_token_id", "[AUDIO]"),
        window=True,
    ),
    "qwen2_audio": Layout(
        "Qwen2AudioForConditionalGeneration",
        "linear",
        "qwen2_audio_encoder",
        ("audio_token_index", "<|AUDIO|>"),
        window=True,
        masked=True,
        pool=2,
    ),
}
# Defaults of the classes, where config.json leaves keys out.
_TEXT = {
    "ultravox": {"model_type": "llama"},
    "qwen2_audio": {"model_type": "qwen2"},
    "voxtral": {
        "model_type": "llama",
        "vocab_size": 131_072,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 30,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e8,
        "head_dim": 128,
    },
}
# Whisper's keys as Voxtral's encoder calls them.
VOXTRAL_KEYS = {
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
}
# Families whose classes scale `inputs_embeds` (Gemma 2's: before transformers 5, and in vLLM).
_SCALES_SPEECH = ("gemma2", "granite")
# Keys of each layout that the projector is computed from, and those that change nothing here.
_ULTRAVOX = {
    "hidden_size": 4096,
    "stack_factor": 8,
    "projector_act": "swiglu",
    "projector_ln_mid": False,
    "num_projector_layers": 0,
    "audio_latency_block_size": None,
}
_PROJECTOR = {
    "ultravox": _ULTRAVOX,
    "voxtral": {"projector_hidden_act": "gelu"},
    "qwen2_audio": {},
}
_CHECKS = {
    "hidden_size": checks.whole(2**18),
    "stack_factor": checks.whole(1024),
    "projector_act": checks.TEXT,
    "projector_ln_mid": checks.FLAG,
    "projector_hidden_act": checks.TEXT,
}
_HARMLESS = """audio_config audio_model_id audio_token_id audio_token_index hidden_size ignore_index
    initializer_range norm_init text_config text_model_id vocab_size audio_model_lora_config
    text_model_lora_config custom_pipelines auto_map transformers_version""".split()


def name(raw: dict[str, Any]) -> str:
    """The layout of a parsed config.json, "" if it is of one part alone."""
    kind = raw.get("model_type")
    return kind if isinstance(kind, str) and kind in LAYOUTS else ""


def text_part(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """What a layout's config.json says of the LLM in it."""
    return _TEXT[name(raw)] | _part(raw, "text", where)


def audio_part(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """What a layout's config.json says of the speech encoder in it."""
    return {"model_type": LAYOUTS[name(raw)].audio} | _part(raw, "audio", where)


def _part(raw: dict[str, Any], part: str, where: str) -> dict[str, Any]:
    elsewhere = raw.get(f"{part}_model_id")
    if elsewhere is not None:
        ours = {"text": "llm", "audio": "encoder"}[part]
        raise ValueError(
            f"{where}: its {part} model is in another directory: set {ours}.path to that of "
            f"{elsewhere}"
        )
    said = raw.get(f"{part}_config")
    stored = {key: raw[key] for key in ("quantization_config",) if key in raw}  # of all weights
    return stored | checks.parsed({} if said is None else said, f"{where}: {part}_config")


def adapter_config(
    raw: dict[str, Any], in_dim: int, out_dim: int, mlp_dim: int, where: str
) -> AdapterConfig:
    """The projector between an encoder and an LLM of these widths; mlp_dim: of the encoder.

    Raises ValueError, listing every problem, for what this project does not compute.
    """
    layout = name(raw)
    if not layout:
        raise ValueError(f"{where}: holds no adapter; {', '.join(LAYOUTS)} have one")
    known = _PROJECTOR[layout]
    c = known | {key: value for key, value in raw.items() if key in known}
    problems = checks.refused_keys(raw, {*known, *_HARMLESS, "projector_hidden_act"})
    problems += checks.wrong_values(c, _CHECKS)
    checks.raise_all(problems, where)
    if layout == "qwen2_audio":
        return AdapterConfig(in_dim, out_dim, hidden_dim=out_dim, kind="linear", stack=1)
    if layout == "voxtral":
        problems += checks.indivisible("intermediate_size", mlp_dim, in_dim)
        if c["projector_hidden_act"] != "gelu":
            problems.append(f"projector_hidden_act={c['projector_hidden_act']!r}: only gelu is")
        checks.raise_all(problems, where)
        return AdapterConfig(
            in_dim, out_dim, hidden_dim=out_dim, kind="voxtral", stack=mlp_dim // in_dim
        )
    if c["projector_act"] != "swiglu":
        problems.append(f"projector_act={c['projector_act']!r}: only swiglu is computed")
    if c["num_projector_layers"]:
        problems.append("num_projector_layers: a projector with Transformer blocks is not computed")
    if c["audio_latency_block_size"] is not None:
        problems.append("audio_latency_block_size: attention in blocks is not computed")
    checks.raise_all(problems, where)
    return AdapterConfig(
        in_dim,
        out_dim,
        hidden_dim=c["hidden_size"],
        kind="ultravox",
        stack=c["stack_factor"],
        late_norm=not c["projector_ln_mid"],
    )


def full_window(layout: str, encoder: SpeechEncoderConfig) -> Window:
    """The window that a layout with this encoder pads audio to."""
    kind = LAYOUTS[layout]
    if not kind.window:
        return Window(0.0, False)
    return Window(_most_frames(encoder) / FRAMES_PER_SECOND, kind.masked)


def _most_frames(encoder: SpeechEncoderConfig) -> int:
    """The mel frames that all positions of an encoder take."""
    return encoder.max_positions * math.prod(encoder.strides)


def obstacles(
    layout: str,
    encoder: EncoderConfig,
    adapter: AdapterConfig,
    llm: LLMConfig,
    window: Window,
) -> list[str]:
    """Why a model of these parts cannot become one of `layout`; nothing if it can."""
    kind, problems = LAYOUTS[layout], []
    if not isinstance(encoder, SpeechEncoderConfig):
        return [f"its encoder is {encoder.family}, not Whisper's"]
    if adapter.kind != kind.kind:
        problems.append(f"adapter.kind={adapter.kind}, not {kind.kind}")
    if adapter.norm != "none":
        problems.append(f"adapter.norm={adapter.norm}: its projector has no such norm")
    if encoder.strides != (1, 2):
        problems.append(f"encoder.strides={encoder.strides}, not Whisper's (1, 2)")
    if encoder.pool != kind.pool:
        problems.append(f"encoder.pool={encoder.pool}, not {kind.pool}")
    needed = full_window(layout, encoder)
    if needed != window:
        problems.append(
            f"data.window={window.seconds:g} and data.window_masked={window.masked}, not "
            f"{needed.seconds:g} and {needed.masked}"
        )
    stack = {"voxtral": encoder.mlp_dim / encoder.embed_dim, "qwen2_audio": 1}.get(layout)
    if stack is not None and adapter.stack != stack:
        problems.append(f"adapter.stack={adapter.stack}, not {stack:g}")
    if layout == "voxtral" and adapter.hidden_dim != llm.embed_dim:
        problems.append(f"adapter.hidden_dim={adapter.hidden_dim}, not the LLM's {llm.embed_dim}")
    return problems + llm_obstacles(layout, llm)


def llm_obstacles(layout: str, llm: LLMConfig) -> list[str]:
    """What the class of a layout would compute otherwise in this LLM than its own class does."""
    problems = []
    if llm.family in _SCALES_SPEECH and llm.embed_scale != 1:
        problems.append(
            f"a {llm.family} model multiplies all that enters it by {llm.embed_scale:g}, speech "
            "too; here only embeddings of tokens are"
        )
    if layout == "ultravox":  # whose LLM keeps its own head
        return problems
    if llm.logit_softcap is not None:
        problems.append(
            f"the LLM's logits are soft-capped at {llm.logit_softcap:g}, and {layout}'s head has "
            "no cap"
        )
    if llm.logit_divisor != 1:
        problems.append(
            f"the LLM's logits are divided by {llm.logit_divisor:g}, and {layout}'s are not"
        )
    return problems


def preprocessor_json(layout: str, encoder: SpeechEncoderConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a layout: Whisper's feature extractor for this encoder."""
    frames = _most_frames(encoder)
    seconds = frames / FRAMES_PER_SECOND
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": encoder.num_mels,
        "sampling_rate": 16_000,
        "n_fft": 400,
        "hop_length": 160,
        "chunk_length": int(seconds) if seconds.is_integer() else seconds,
        "n_samples": frames * 160,
        "nb_max_frames": frames,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": LAYOUTS[layout].masked or not LAYOUTS[layout].window,
    }


def _whisper_of(raw: dict[str, Any]) -> str:
    return f"openai/whisper-{'tiny' if raw['audio_config']['num_mel_bins'] == 80 else 'large-v3'}"


def config_json(
    layout: str,
    audio: dict[str, Any],
    adapter: AdapterConfig,
    text: dict[str, Any],
    audio_token: int,
) -> dict[str, Any]:
    """The config.json of a layout, of those of its encoder and its LLM."""
    kind = LAYOUTS[layout]
    audio = {key: value for key, value in audio.items() if key != "architectures"}
    raw = {
        "architectures": [kind.architecture],
        "model_type": layout,
        "audio_config": audio | {"model_type": kind.audio},
        "text_config": text,
        kind.token[0]: audio_token,
    }
    if layout == "voxtral":
        raw["projector_hidden_act"] = "gelu"
        renamed = {VOXTRAL_KEYS.get(k, k): v for k, v in raw["audio_config"].items()}
        raw["audio_config"] = renamed
    if layout == "ultravox":
        raw |= _ULTRAVOX | {
            "hidden_size": adapter.hidden_dim,
            "stack_factor": adapter.stack,
            "projector_ln_mid": not adapter.late_norm,
            "vocab_size": text["vocab_size"],
            "ignore_index": -100,
            # Ultravox's own code takes its encoder class and its feature extractor from a name.
            "audio_config": raw["audio_config"] | {"_name_or_path": _whisper_of(raw)},
        }
    return raw
