"""Images that cannot be read, met amid training."""

import shutil

import jax
import pytest
from command_line import lines_of
from faults.training_test import assert_same, final, folder_of

from abe_jax import train
from abe_jax.errors import UserError
from abe_jax.train import progress
from abe_jax.workdir import checkpoints


def test_a_broken_image_mid_run_loses_no_line(tiny, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    images = shutil.copytree(photos, tmp_path / "photos")
    config = folder_of(tiny(steps=20, log_every=1, checkpoint_every=20), images)
    config.train.eval_every = 20
    config.data.in_memory = False
    train.train_and_evaluate(config, str(tmp_path / "whole"))
    victim = images / "class03" / "5.png"
    sound = victim.read_bytes()
    victim.write_bytes(b"not an image")
    with pytest.raises(UserError, match="class03/5.png"):
        train.train_and_evaluate(config, str(tmp_path / "run"))
    (step,) = checkpoints.steps_in(tmp_path / "run")
    logged = [m["step"] for m in lines_of(tmp_path / "run") if "train/loss" in m]
    assert logged == list(range(1, step + 1))
    victim.write_bytes(sound)
    train.train_and_evaluate(config, str(tmp_path / "run"))
    assert_same(final(tmp_path / "run", 20), final(tmp_path / "whole", 20))


@pytest.fixture
def with_a_broken_image(tiny, photos, tmp_path):
    """A config of 20 steps that meet an image which cannot be read."""
    images = shutil.copytree(photos, tmp_path / "photos")
    config = folder_of(tiny(steps=20, log_every=20), images)
    config.data.in_memory = False
    (images / "class03" / "5.png").write_bytes(b"not an image")
    return config


def make_losses_nan(monkeypatch, is_one):
    """Of the steps of which `is_one(step)` holds."""
    add = progress.Reporter.add

    def add_what_is_not_finite(self, step, arrays):
        nan = {"loss": jax.numpy.float32(jax.numpy.nan)} if is_one(step) else {}
        add(self, step, {**arrays, **nan})

    monkeypatch.setattr(progress.Reporter, "add", add_what_is_not_finite)


def test_a_broken_image_amid_steps_that_are_not_finite_saves_nothing(
    with_a_broken_image, tmp_path, monkeypatch
):
    make_losses_nan(monkeypatch, lambda step: True)
    with pytest.raises(checkpoints.NotFinite, match="loss is nan at step 1"):
        train.train_and_evaluate(with_a_broken_image, str(tmp_path / "run"))
    assert checkpoints.steps_in(tmp_path / "run") == []


def test_a_broken_image_right_after_a_step_that_is_not_finite_saves_nothing(
    with_a_broken_image, tmp_path, monkeypatch
):
    """The loss that is pending when the image is met is looked at first."""
    config = with_a_broken_image
    with pytest.raises(UserError, match=r"class03/5\.png"):
        train.train_and_evaluate(config, str(tmp_path / "sound"))
    last = checkpoints.steps_in(tmp_path / "sound")[-1]
    assert last % config.train.checkpoint_every  # saved since the image is broken
    make_losses_nan(monkeypatch, lambda step: step == last)
    with pytest.raises(checkpoints.NotFinite, match=f"loss is nan at step {last}"):
        train.train_and_evaluate(config, str(tmp_path / "run"))
    assert checkpoints.steps_in(tmp_path / "run") == [4]
