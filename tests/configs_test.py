"""Every file in configs/ trains for a step and is evaluated."""

import importlib
import pathlib

import pytest

from abe_jax import train

CONFIGS = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
)


def shrunk(config, photos):
    """The same job with a trunk, images and data as small as they can be."""
    config.model.update(width=0.05, num_learners=2, embedding_dim=8)
    config.data.update(load_size=36, image_size=32)
    config.data.update(birds_classes=32, birds_images_per_class=16, path=str(photos))
    config.train.update(steps=1)
    config.eval.batch_size = 16
    return config


def test_the_configs_are_found():
    assert {"default", "quickstart", "emoji64"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_step(name, photos, tmp_path):
    module = importlib.import_module(f"configs.{name}")
    config = shrunk(module.get_config(), photos)
    metrics = train.train_and_evaluate(config, str(tmp_path / "run"))
    assert 0.0 <= metrics["eval/recall@1"] <= 1.0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m_heads", "one_head"])
def test_baselines_are_one_changed_flag(name, photos, tmp_path):
    module = importlib.import_module("configs.emoji64")
    config = shrunk(module.get_config(), photos)
    config.model.name = name
    metrics = train.train_and_evaluate(config, str(tmp_path / "run"))
    learners = {key for key in metrics if key.startswith("eval/learner_")}
    assert len({key.split("/")[1] for key in learners}) == (
        2 if name == "m_heads" else 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_mapping_and_pairs_from_the_command_line_fields(mapping, photos, tmp_path):
    module = importlib.import_module("configs.quickstart")
    config = shrunk(module.get_config(), photos)
    config.data.sampler = "pairs"
    config.parallel.mapping = mapping
    metrics = train.train_and_evaluate(config, str(tmp_path / "run"))
    assert metrics["eval/map_at_r"] >= 0.0
