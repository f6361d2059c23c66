"""What a dry run says of training, and that it leaves nothing behind."""

import jax
import pytest
from flax import nnx

from abe_jax import models
from abe_jax.errors import UserError
from abe_jax.models.shapes import without_values
from abe_jax.train import forecast, loop
from configs import inshop, quickstart


def shrunk(config):
    config.model.update(trunk="vit_small_patch16", attention_blocks=1)  # quickest
    config.model.update(width=0.05, num_learners=2, embedding_dim=8)
    config.data.update(load_size=32, image_size=32)
    config.train.update(steps=40, batch_size=16, eval_every=15)
    config.eval.batch_size = 4
    return config


def told(config, workdir, capsys):
    forecast.show_forecast(config, str(workdir))
    lines = capsys.readouterr().out.splitlines()
    assert not workdir.exists()
    return {line[:12].strip(): line[12:] for line in lines}


@pytest.mark.slow
def test_parameters_batches_memory_and_time(tmp_path, capsys):
    config = shrunk(quickstart.get_config())
    config.data.update(birds_classes=16, birds_images_per_class=10, images_per_class=4)
    rows = told(config, tmp_path / "run", capsys)
    model = without_values(lambda rngs: models.create(config.model, rngs=rngs))
    number = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert rows["model"].startswith(f"abe, vit_small_patch16: {number:,} parameters, ")
    assert rows["images"] == "120 train, 40 test"
    batches = "16 images on 8 devices; 40 steps from the first, 5.3 times all of train"
    assert rows["batches"] == batches
    assert rows["memory"].endswith(" MB of this process at most")
    assert rows["a step"].endswith(" images/s")
    assert rows["evaluation"].endswith(" s to embed, 4 of them")
    assert rows["in all"].startswith("about ")


@pytest.mark.slow
def test_a_gallery_of_its_own_is_counted(data_dir, tmp_path, capsys):
    config = shrunk(inshop.get_config())
    config.data.path = str(data_dir)
    rows = told(config, tmp_path / "run", capsys)
    assert rows["images"].endswith("18 test, 17 gallery")


@pytest.mark.parametrize("steps", range(1, 9))
def test_evaluations_are_counted(steps):
    config = quickstart.get_config().train
    config.update(steps=steps, eval_every=3)
    evaluated = [loop.is_evaluated(config, step) for step in range(steps + 1)]
    assert loop.count_evaluations(config) == sum(evaluated)


def test_what_training_refuses_is_refused(tmp_path):
    config = shrunk(quickstart.get_config())
    config.train.batch_size = 12
    with pytest.raises(UserError, match=r"is not divisible by 8 device\(s\)"):
        forecast.show_forecast(config, str(tmp_path))


@pytest.mark.slow
def test_the_outputs_of_a_frozen_s_are_counted(tmp_path, capsys):
    config = shrunk(quickstart.get_config())
    config.data.update(birds_classes=16, birds_images_per_class=10)
    config.data.feature_cache = str(tmp_path / "cache")
    config.model.train = "heads"
    config.augment.update(crop="centre", flip=0.0, brightness=0.0, contrast=0.0)
    rows = told(config, tmp_path / "run", capsys)
    assert rows["features"].endswith(" s at most, where none are kept yet")
    assert not (tmp_path / "cache").exists()
