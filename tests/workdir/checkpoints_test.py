"""States written and read back, on other devices, and after damage of every kind."""

import contextlib
import gc
import json
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from abe_jax import parallel, train_step
from abe_jax.errors import UserError
from abe_jax.workdir import checkpoints
from configs import quickstart


def state_of(step, seed=0, shape=(3, 4)):
    rng = np.random.default_rng(seed)
    params = {"layer": {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}}
    averages = {"norm": {"mean": jnp.asarray(rng.normal(size=4), jnp.float32)}}
    return train_step.TrainState(
        jnp.int32(step),
        params,
        averages,
        optax.adam(0.1).init(params),
        loss_params={},
    )


def assert_same(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jax.tree.structure(got) == jax.tree.structure(want)


@pytest.mark.parametrize(("written", "read"), [(1, 8), (8, 1), (8, 2), (2, 4)])
def test_restores_on_any_number_of_devices(tmp_path, written, read):
    config = quickstart.get_config()
    state = state_of(7)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        mesh = parallel.make_mesh(jax.devices()[:written])
        saved.save(parallel.replicate(state, mesh), config)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        mesh = parallel.make_mesh(jax.devices()[:read])
        restored = saved.restore(state_of(0, seed=1), mesh)
    assert_same(restored, state)
    assert all(len(x.devices()) == read for x in jax.tree.leaves(restored))


def test_newest_are_kept_and_any_can_be_chosen(tmp_path):
    mesh = parallel.make_mesh()
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=2)) as saved:
        for step in (1, 2, 3):
            saved.save(state_of(step, seed=step), quickstart.get_config())
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        assert saved.steps == [2, 3]
        assert_same(saved.restore(state_of(0), mesh), state_of(3, seed=3))
        assert_same(saved.restore(state_of(0), mesh, 2), state_of(2, seed=2))
        with pytest.raises(UserError, match="no checkpoint of step 1 .*there are 2, 3"):
            saved.restore(state_of(0), mesh, 1)


def test_saving_a_step_twice_is_no_error(tmp_path):
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        for _ in range(2):
            saved.save(state_of(1), quickstart.get_config())


def test_no_checkpoint_says_so(tmp_path):
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        with pytest.raises(UserError, match="train first"):
            saved.restore(state_of(0), parallel.make_mesh())


def test_checkpoint_of_another_model_is_refused(tmp_path):
    mesh = parallel.make_mesh()
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        saved.save(state_of(1), quickstart.get_config())
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        with pytest.raises(
            UserError,
            match=r"does not fit the config's model: 3 arrays differ, the first is "
            r"opt_state.0.mu.layer.kernel \(there \(3, 4\), now \(3, 5\)\)",
        ):
            saved.restore(state_of(1, shape=(3, 5)), mesh)
        other = state_of(1)
        other.params["head"] = {"bias": jnp.zeros(2)}
        with pytest.raises(UserError, match=r"params.head.bias \(there missing, now"):
            saved.restore(other, mesh)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir with the checkpoints of steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("two")
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saved:
        for step in (4, 8):
            saved.save(
                state_of(step, seed=step, shape=(30, 40)), quickstart.get_config()
            )
    return workdir


def one_device():
    return parallel.make_mesh(jax.devices()[:1])


def restore(workdir, step=None, **options):
    with contextlib.closing(checkpoints.Checkpoints(workdir, **options)) as saved:
        return saved.restore(state_of(0, shape=(30, 40)), one_device(), step)


def largest(folder):
    return max(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "an emptied array": (lambda f: largest(f).write_bytes(b""), "has 0 bytes instead"),
    "half an array": (
        lambda f: largest(f).write_bytes(largest(f).read_bytes()[:999]),
        "has 999 bytes instead",
    ),
    "a flipped bit": (lambda f: flip(largest(f)), "other content than was written"),
    "a lost array": (lambda f: largest(f).unlink(), "is missing"),
    "no METADATA": (lambda f: (f / "state/_METADATA").unlink(), "_METADATA is missing"),
    "an empty METADATA": (lambda f: (f / "state/_METADATA").write_text(""), "0 bytes"),
    "an empty manifest": (
        lambda f: (f / "state/manifest.ocdbt").write_bytes(b""),
        "manifest.ocdbt has 0 bytes",
    ),
    "an empty config": (lambda f: (f / "config/metadata").write_text(""), "0 bytes"),
    "no state": (lambda f: shutil.rmtree(f / "state"), "is missing"),
    "an empty list": (lambda f: (f / "files.json").write_text(""), "files.json"),
    "an empty folder": (lambda f: [shutil.rmtree(f), f.mkdir()], "state"),
    "no list, no state": (
        lambda f: [(f / "files.json").unlink(), shutil.rmtree(f / "state")],
        "state",
    ),
    "no list, no METADATA": (
        lambda f: [(f / "files.json").unlink(), (f / "state/_METADATA").unlink()],
        "_METADATA is missing",
    ),
    "a folder in its place": (
        lambda f: [(f / "config/metadata").unlink(), (f / "config/metadata").mkdir()],
        "Is a directory",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(
    name, two_steps, tmp_path, caplog
):
    damage, message = DAMAGE[name]
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    damage(workdir / "checkpoints" / "8")
    with caplog.at_level(logging.WARNING):
        state = restore(workdir, read_only=True)
    assert_same(state, state_of(4, seed=4, shape=(30, 40)))
    assert "The checkpoint of step 8 is damaged" in caplog.text
    assert message in caplog.text
    # Looked at only: nothing was moved, and that step alone is refused.
    assert (workdir / "checkpoints" / "8").is_dir()
    with pytest.raises(UserError, match="step 8 is damaged.*leave --step out"):
        restore(workdir, 8, read_only=True)
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saved:
        state = saved.restore(state_of(0, shape=(30, 40)), one_device())
        saved.set_damaged_aside(newest=4)
        assert saved.steps == [4]
        saved.save(state_of(8, seed=8, shape=(30, 40)), quickstart.get_config())
    assert_same(restore(workdir), state_of(8, seed=8, shape=(30, 40)))
    assert (workdir / "damaged_checkpoints" / "8").is_dir()


def test_a_checkpoint_that_training_replaces_is_not_called_damaged(
    two_steps, tmp_path, monkeypatch
):
    workdir = shutil.copytree(two_steps, tmp_path / "run")

    def gone(folder):
        shutil.rmtree(folder)
        return "files.json is missing"

    monkeypatch.setattr(checkpoints.seals, "damage", gone)
    with pytest.raises(
        UserError, match="step 4 was deleted while it was read: training in"
    ):
        restore(workdir, 4, read_only=True)


def test_what_fails_beside_a_sound_checkpoint_is_not_called_damage(
    two_steps, tmp_path, monkeypatch
):
    workdir = shutil.copytree(two_steps, tmp_path / "run")

    def no_memory(*_, **__):
        raise MemoryError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(ocp.CheckpointManager, "restore", no_memory)
        restore(workdir)
    assert_same(restore(workdir), state_of(8, seed=8, shape=(30, 40)))


def test_where_all_are_damaged_each_is_named(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    for step in (4, 8):
        largest(workdir / "checkpoints" / str(step)).write_bytes(b"")
    with pytest.raises(UserError, match="step 8 is damaged: .*step 4 is damaged: "):
        restore(workdir)
    assert {p.name for p in (workdir / "checkpoints").iterdir()} >= {"4", "8"}


def test_what_a_killed_save_left_is_cleared_away(two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    left = workdir / "checkpoints" / "12.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "8", left)
    assert_same(restore(workdir, read_only=True), state_of(8, seed=8, shape=(30, 40)))
    assert left.exists()  # it may be a running save
    assert_same(restore(workdir), state_of(8, seed=8, shape=(30, 40)))
    assert not left.exists()


def test_what_a_killed_save_left_cannot_be_cleared_away(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir(parents=True)

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(checkpoints.NotWritable, match=r"Permission denied.*12\.orbax"):
        checkpoints.Checkpoints(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["params", "model_state", "opt_state"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, part, value):
    state = state_of(3)
    broken = jax.tree.map(
        lambda x: x.at[(0,) * x.ndim].set(value) if x.dtype == jnp.float32 else x,
        getattr(state, part),
    )
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        saved.save(state_of(2), quickstart.get_config())
        with pytest.raises(
            checkpoints.NotFinite, match=f"{part}.*lower train.learning"
        ):
            saved.save(state._replace(**{part: broken}), quickstart.get_config())
    assert checkpoints.steps_in(tmp_path) == [2]


# Orbax leaves the coroutines of a failed write behind, unfinished.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_told_and_the_earlier_checkpoint_is_kept(tmp_path):
    config = quickstart.get_config()
    big = state_of(2, shape=(300, 400))
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        saved.save(state_of(1, shape=(300, 400)), config)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = checkpoints.Checkpoints(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            checkpoints.NotWritable, match="cannot write the checkpoint"
        ):
            saved.save(big, config)
            saved.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.steps_in(tmp_path) == [1]
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        mesh = parallel.make_mesh()
        want = state_of(1, shape=(300, 400))
        assert_same(saved.restore(state_of(0, shape=(300, 400)), mesh), want)
        saved.save(big, config)
    assert checkpoints.steps_in(tmp_path) == [1, 2]
    gc.collect()  # here, where that is known, and not in another test


def test_the_death_of_another_process_amid_a_save_is_no_full_disk(
    tmp_path, monkeypatch
):
    """All processes write a checkpoint together, and wait for each other."""
    lost = RuntimeError("INTERNAL: Barrier failed: Task 1 heartbeat timeout.\nMore")

    def fail(self):
        raise lost

    def fail_as_orbax_does(self):
        raise TimeoutError("Timed out while waiting for a barrier.") from lost

    saved = checkpoints.Checkpoints(tmp_path)
    manager = type(saved._manager)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    said = r"another process of this run ended.*start all of them again.*timeout\)\."
    with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
        patch.setattr(manager, "wait_until_finished", fail)
        saved.save(state_of(1), quickstart.get_config())
    with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
        patch.setattr(manager, "close", fail_as_orbax_does)
        saved.close()
    saved.close()


def test_weights_are_read_without_knowing_the_model(two_steps):
    with contextlib.closing(
        checkpoints.Checkpoints(two_steps, read_only=True)
    ) as saved:
        stored = saved.restore_as_stored(4)
    want = jax.device_get(state_of(4, seed=4, shape=(30, 40)))
    assert stored["step"] == 4
    assert_same(stored["params"], want.params)
    assert_same(stored["model_state"], want.model_state)


def test_the_list_names_every_file_that_counts(two_steps):
    folder = two_steps / "checkpoints" / "8"
    listed = json.loads((folder / "files.json").read_text())
    assert {"config/metadata", "state/_METADATA"} <= set(listed)
    assert set(listed) >= {
        path.relative_to(folder).as_posix()
        for path in folder.glob("*/**/*")
        if path.is_file() and path.name != "commit_success.txt"  # comes after it
    }
