"""A network so small, and pages without plots: a whole run takes a second."""

import jax.numpy as jnp
from flax import nnx

from abe_jax import models
from abe_jax.models.trunk import Preprocessing
from abe_jax.report import plots


class Quarters(nnx.Module):
    """The mean colours of an image's quarters, mixed: S of `Tiny`."""

    def __init__(self, rngs: nnx.Rngs):
        self.mix = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, images):
        size, half = images.shape[0], images.shape[1] // 2
        colours = images.reshape(size, 2, half, 2, half, 3).mean((2, 4))
        return self.mix(colours.reshape(size, 12))


class Tiny(nnx.Module):
    """A linear layer behind them, for two learners."""

    num_learners = 2
    preprocessing = Preprocessing((0.0,) * 3, 255.0, False)

    def __init__(self, rngs: nnx.Rngs, dim: int = 4):
        self.spatial = Quarters(rngs)
        self.head = nnx.Linear(8, self.num_learners * dim, rngs=rngs)

    def __call__(self, images):
        return self.from_spatial(self.spatial(images))

    def from_spatial(self, features):
        flat = self.head(nnx.tanh(features))
        learners = flat.reshape(len(features), self.num_learners, -1)
        length = jnp.sqrt(jnp.sum(learners**2, axis=-1, keepdims=True) + 1e-12)
        return learners / length


def replace_models(monkeypatch) -> None:
    """Has every config make that network, and no report draw plots."""

    def create(config, *, rngs):
        assert config.pretrained is None, "nothing but a file is read here"
        return Tiny(rngs, dim=config.embedding_dim // 2)

    monkeypatch.setattr(models, "create", create)
    monkeypatch.setattr(plots, "_svg", lambda *_, **__: "<svg></svg>")
