"""Flax Linen modules of a spoken language model: speech encoder, adapter, LLM."""
