"""Pretrained models in Hugging Face layout, in and out; nothing else knows Hugging Face's names."""

from otreg_jax.pretrained.load import (
    llm_config,
    load_llm,
    load_speech_encoder,
    read_json,
    resolve,
    speech_encoder_config,
)
from otreg_jax.pretrained.save import save_llm, save_speech_encoder

__all__ = [
    "llm_config",
    "load_llm",
    "load_speech_encoder",
    "read_json",
    "resolve",
    "save_llm",
    "save_speech_encoder",
    "speech_encoder_config",
]
