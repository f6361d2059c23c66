"""A run starts from a run of another model on the same trunk."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from ml_collections import ConfigDict

from abe_jax import models, train_step
from abe_jax.errors import UserError
from abe_jax.workdir import checkpoints, weights

SIZES = {"trunk": "googlenet_bn", "width": 0.05, "num_learners": 2, "embedding_dim": 8}


def state_of(name, seed):
    section = ConfigDict({"name": name, **SIZES})
    model = models.create(section, rngs=nnx.Rngs(seed))
    return train_step.initial_state(model, optax.identity())


def flat(tree):
    found = traverse_util.flatten_dict(tree)
    return {tuple(map(str, path)): np.asarray(x) for path, x in found.items()}


@pytest.fixture
def run_of(monkeypatch, tmp_path):
    """A workdir whose newest checkpoint is a given state."""

    def make(state):
        class Saved:
            def __init__(self, *_, **__):
                pass

            def restore_as_stored(self):
                return jax.tree.map(
                    np.asarray,
                    {
                        "step": 7,
                        "params": state.params,
                        "model_state": state.model_state,
                    },
                )

            def close(self):
                pass

        monkeypatch.setattr(checkpoints, "Checkpoints", Saved)
        return tmp_path

    return make


@pytest.mark.parametrize("name", ["abe", "m_heads"])
def test_every_section_starts_from_the_trunk_of_a_one_head(name, run_of):
    other, new = state_of("one_head", seed=1), state_of(name, seed=2)
    started = weights.start_from(new, run_of(other))
    for part in ("params", "model_state"):
        source = {
            models.layer_of(path): value
            for path, value in flat(getattr(other, part)).items()
            if not models.is_new_layer(path)
        }
        found, fresh = flat(getattr(started, part)), flat(getattr(new, part))
        assert found.keys() == fresh.keys()
        for path, value in found.items():
            if models.is_new_layer(path):
                np.testing.assert_array_equal(value, fresh[path])
            else:
                wanted = source[models.layer_of(path)]
                np.testing.assert_array_equal(
                    value, np.broadcast_to(wanted, value.shape)
                )


def test_a_trunk_that_is_not_there_is_refused(run_of):
    with pytest.raises(UserError, match="is a run of another model: .* is missing"):
        weights.start_from(state_of("one_head", 1), run_of(state_of("m_heads", 2)))
