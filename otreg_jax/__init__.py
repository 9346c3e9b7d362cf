"""Spoken language models with Optimal Transport Regularization, in JAX/Flax."""

__version__ = "0.1.0"
