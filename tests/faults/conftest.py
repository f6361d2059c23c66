"""Runs of a second each, to be disturbed often."""

import functools
import shutil

import pytest
from flax import nnx
from tiny import replace_models

from abe_jax import parallel, train, train_step
from configs import quickstart

_PROGRAMS = {}
_MAPPED = functools.cache(parallel.map_over_devices)


def _once(make):
    """Makes a program once for each model and config: half of a run was to trace it."""

    def made(model, *others):
        asked = others[-1] if isinstance(others[-1], int) else others[-1].to_json()
        key = make, nnx.graphdef(model), asked
        if key not in _PROGRAMS:
            _PROGRAMS[key] = make(model, *others)
        return _PROGRAMS[key]

    return made


def _make_tiny(patch):
    replace_models(patch)
    for name in ("make_train_step", "make_embed_step"):
        patch.setattr(train_step, name, _once(getattr(train_step, name)))
    patch.setattr(parallel, "map_over_devices", _MAPPED)


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
    _make_tiny(monkeypatch)
    return _config


@pytest.fixture(scope="module")
def _finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        _make_tiny(patch)
        train.train_and_evaluate(_config(), str(workdir))
    return workdir


@pytest.fixture
def finished(_finished, tiny, tmp_path):
    """A run of eight steps that nothing disturbed; each test's own copy."""
    return shutil.copytree(_finished, tmp_path / "finished")
