"""Runs of a second each, to be disturbed often."""

import shutil

import pytest
from tiny import replace_models

from abe_jax import train
from configs import quickstart


def _config(**train_fields):
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
    config.train.update(**train_fields)
    return config


@pytest.fixture
def tiny(monkeypatch):
    """Makes configs of runs with that network."""
    replace_models(monkeypatch)
    return _config


@pytest.fixture(scope="module")
def _finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        replace_models(patch)
        train.train_and_evaluate(_config(), str(workdir))
    return workdir


@pytest.fixture
def finished(_finished, tiny, tmp_path):
    """A run of eight steps that nothing disturbed; each test's own copy."""
    return shutil.copytree(_finished, tmp_path / "finished")
