"""Pretrained models in Hugging Face layout, in and out; nothing else knows Hugging Face's names."""

from otreg_jax.pretrained.layouts import LAYOUTS, Window, obstacles
from otreg_jax.pretrained.load import (
    adapter_config,
    llm_config,
    load_adapter,
    load_llm,
    load_speech_encoder,
    read_json,
    resolve,
    speech_encoder_config,
    window,
)
from otreg_jax.pretrained.peft import load_lora, save_lora, with_pairs
from otreg_jax.pretrained.save import save_layout, save_llm, save_speech_encoder

__all__ = [
    "LAYOUTS",
    "Window",
    "adapter_config",
    "llm_config",
    "load_adapter",
    "load_llm",
    "load_lora",
    "load_speech_encoder",
    "obstacles",
    "read_json",
    "resolve",
    "save_layout",
    "save_llm",
    "save_lora",
    "save_speech_encoder",
    "speech_encoder_config",
    "window",
    "with_pairs",
]
