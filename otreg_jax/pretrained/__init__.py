"""Pretrained models in Hugging Face layout, in and out; nothing else knows Hugging Face's names."""

from otreg_jax.pretrained.load import load_llm, load_speech_encoder, resolve
from otreg_jax.pretrained.save import save_llm, save_speech_encoder

__all__ = ["load_llm", "load_speech_encoder", "resolve", "save_llm", "save_speech_encoder"]
