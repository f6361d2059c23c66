"""Runs of a second each, to be disturbed often."""

import pytest
from tiny import replace_models

from configs import quickstart


@pytest.fixture
def tiny(monkeypatch):
    """Makes configs of runs with that network."""
    replace_models(monkeypatch)

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
