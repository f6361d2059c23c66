"""States written and read back, on other numbers of devices, and workdirs."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from abe_jax import parallel, train_step
from abe_jax.errors import UserError
from abe_jax.workdir import checkpoints as checkpoint
from configs import quickstart


def state_of(step, seed=0, shape=(3, 4)):
    rng = np.random.default_rng(seed)
    params = {"layer": {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}}
    averages = {"norm": {"mean": jnp.asarray(rng.normal(size=4), jnp.float32)}}
    return train_step.TrainState(
        jnp.int32(step), params, averages, optax.adam(0.1).init(params)
    )


def assert_same(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jax.tree.structure(got) == jax.tree.structure(want)


@pytest.mark.parametrize(("written", "read"), [(1, 8), (8, 1), (8, 2), (2, 4)])
def test_restores_on_any_number_of_devices(tmp_path, written, read):
    config = quickstart.get_config()
    state = state_of(7)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        mesh = parallel.make_mesh(jax.devices()[:written])
        checkpoints.save(parallel.replicate(state, mesh), config)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        mesh = parallel.make_mesh(jax.devices()[:read])
        restored = checkpoints.restore(state_of(0, seed=1), mesh)
    assert_same(restored, state)
    assert all(len(x.devices()) == read for x in jax.tree.leaves(restored))


def test_newest_are_kept_and_any_can_be_chosen(tmp_path):
    mesh = parallel.make_mesh()
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state_of(step, seed=step), quickstart.get_config())
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.steps == [2, 3]
        assert_same(checkpoints.restore(state_of(0), mesh), state_of(3, seed=3))
        assert_same(checkpoints.restore(state_of(0), mesh, 2), state_of(2, seed=2))
        with pytest.raises(UserError, match="no checkpoint of step 1 .*there are 2, 3"):
            checkpoints.restore(state_of(0), mesh, 1)


def test_saving_a_step_twice_is_no_error(tmp_path):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        for _ in range(2):
            checkpoints.save(state_of(1), quickstart.get_config())


def test_no_checkpoint_says_so(tmp_path):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(UserError, match="train first"):
            checkpoints.restore(state_of(0), parallel.make_mesh())


def test_checkpoint_of_another_model_is_refused(tmp_path):
    mesh = parallel.make_mesh()
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state_of(1), quickstart.get_config())
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(
            UserError,
            match=r"does not fit the config's model: 3 arrays differ, the first is "
            r"opt_state.0.mu.layer.kernel \(there \(3, 4\), now \(3, 5\)\)",
        ):
            checkpoints.restore(state_of(1, shape=(3, 5)), mesh)
        other = state_of(1)
        other.params["head"] = {"bias": jnp.zeros(2)}
        with pytest.raises(UserError, match=r"params.head.bias \(there missing, now"):
            checkpoints.restore(other, mesh)


def test_workdir_belongs_to_one_config(tmp_path):
    config = quickstart.get_config()
    workdir = tmp_path / "runs" / "one"
    checkpoint.claim_workdir(workdir, config)
    checkpoint.claim_workdir(workdir, config)
    config.train.log_every = 7  # does not change the result
    config.parallel.mapping = "pmap"
    checkpoint.claim_workdir(workdir, config)
    config.train.learning_rate = 0.5
    config.seed = 3
    with pytest.raises(
        UserError, match=r"seed \(there 0, now 3\), train.learning_rate"
    ):
        checkpoint.claim_workdir(workdir, config)


def test_workdir_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --workdir"):
        checkpoint.claim_workdir(tmp_path / "file" / "run", quickstart.get_config())
