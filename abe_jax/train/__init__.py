"""Training: the loop, and what it is put together from."""

from abe_jax.train.loop import train_and_evaluate
from abe_jax.train.stop import Interrupted

__all__ = ["Interrupted", "train_and_evaluate"]
