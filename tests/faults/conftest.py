"""A network so small that a whole run takes a second, to be disturbed often."""

import jax.numpy as jnp
import pytest
from flax import nnx

from abe_jax import models
from abe_jax.models.trunk import Preprocessing
from configs import quickstart


class Tiny(nnx.Module):
    """The mean colours of an image's quarters, and a linear layer."""

    num_learners = 2
    preprocessing = Preprocessing((0.0,) * 3, 255.0, False)

    def __init__(self, rngs: nnx.Rngs, dim: int = 4):
        self.body = nnx.Linear(12, 8, rngs=rngs)
        self.head = nnx.Linear(8, self.num_learners * dim, rngs=rngs)

    def __call__(self, images):
        return self.behind(self.spatial(images))

    def spatial(self, images):
        size, half = images.shape[0], images.shape[1] // 2
        return images.reshape(size, 2, half, 2, half, 3).mean((2, 4)).reshape(size, 12)

    def behind(self, colours):
        flat = self.head(nnx.tanh(self.body(colours)))
        learners = flat.reshape(len(colours), self.num_learners, -1)
        length = jnp.sqrt(jnp.sum(learners**2, axis=-1, keepdims=True) + 1e-12)
        return learners / length


@pytest.fixture
def tiny(monkeypatch):
    """Makes configs of runs with that network."""

    def create(config, *, rngs):
        assert config.pretrained is None, "nothing but a file is read here"
        return Tiny(rngs, dim=config.embedding_dim // 2)

    monkeypatch.setattr(models, "create", create)

    def config(**train):
        config = quickstart.get_config()
        config.model.update(num_learners=2, embedding_dim=8)
        config.data.update(load_size=16, image_size=16)
        config.data.update(sampler="classes", images_per_class=4)
        config.data.update(birds_classes=16, birds_images_per_class=8)
        config.data.update(num_threads=1)
        config.augment.update(brightness=0.0, contrast=0.0)
        config.eval.batch_size = 4
        config.train.update(steps=8, batch_size=16, warmup_steps=0, log_every=2)
        config.train.update(eval_every=4, checkpoint_every=4, schedule="constant")
        config.train.update(**train)
        return config

    return config
