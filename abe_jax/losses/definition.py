"""What a loss of each learner's embeddings consists of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Tree = Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a loss's own parameters depend on.

    Attributes:
      num_classes: of the training classes.
      num_learners: M.
      dim: d, the dimensions of one learner.
    """

    num_classes: int
    num_learners: int
    dim: int


def _no_parameters(key: jax.Array, sizes: Sizes) -> Tree:
    del key, sizes
    return {}


@dataclasses.dataclass(frozen=True)
class MetricLoss:
    """A loss that draws images of one class together, learner by learner.

    Attributes:
      share: one device's share, float32 scalar, of its embeddings `[B, M, d]`, their
        labels `[B]` (0 to num_classes - 1), the loss's own parameters, the `loss`
        section of a config, and the mapped axis.
      initial: the loss's own parameters, a nested dict, from a random key and the
        sizes; most losses have none.
    """

    share: Callable[[jax.Array, jax.Array, Tree, Any, str], jax.Array]
    initial: Callable[[jax.Array, Sizes], Tree] = _no_parameters
