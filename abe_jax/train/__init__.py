"""Training: the loop, and what it is put together from."""

from abe_jax.interrupts import Interrupted
from abe_jax.train.loop import train_and_evaluate

__all__ = ["Interrupted", "train_and_evaluate"]
