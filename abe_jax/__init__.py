"""Attention-based Ensemble for Deep Metric Learning (ABE) in JAX and Flax."""

__version__ = "0.1.0"
