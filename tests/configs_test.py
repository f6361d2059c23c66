"""Every file in configs/ trains for a step and is evaluated."""

import importlib
import json
import pathlib

import jax
import pytest
from tiny import replace_models

from abe_jax import train

CONFIGS = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
)


PREPARED = {"cub200", "cars196", "sop", "inshop"}
# Recall@K of the paper's tables, and the parts of the data that the configs name.
PROTOCOLS = {
    "cub200": ("cub200", False, (1, 2, 4, 8)),
    "cub200_cropped": ("cub200", True, (1, 2, 4, 8)),
    "cars196": ("cars196", False, (1, 2, 4, 8)),
    "cars196_cropped": ("cars196", True, (1, 2, 4, 8)),
    "sop": ("sop", False, (1, 10, 100, 1000)),
    "inshop": ("inshop", False, (1, 10, 20, 30, 40, 50)),
    "image_folder": ("image_folder", False, (1, 2, 4, 8)),
}
# Those whose `model` sections differ; the others start with the smallest network.
OWN_MODEL = {"quickstart", "photos", "emoji64", "cub200", "cub200_resnet50"}
RESNETS = {f"{name}_resnet50": name for name in sorted(PREPARED)}


def shrunk(config, photos):
    """The same job with a trunk, images and data as small as they can be."""
    config.model.update(width=0.05, num_learners=2, embedding_dim=8)
    if config.model.branch is None:  # behind that of configs/photos.py are none
        config.model.attention_blocks = 1
    config.data.update(load_size=36, image_size=32)
    config.data.update(birds_classes=32, birds_images_per_class=16)
    if config.data.name != "birds":
        config.data.path = str(photos)
    config.train.update(steps=1)
    config.eval.batch_size = 16
    if config.data.feature_cache:  # configs/photos.py, whose file is on a hub
        config.model.pretrained = None
        config.data.update(load_size=28, image_size=28)
        config.data.feature_cache = str(photos.parent / "features")
    return config


def test_the_configs_are_found():
    assert {"default", "quickstart", "emoji64", *PROTOCOLS, *RESNETS} <= set(CONFIGS)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_are_those_of_the_paper(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    found = (config.data.name, config.data.box_crop, config.eval.recall_at)
    assert found == PROTOCOLS[name]
    assert (config.model.name, config.model.num_learners) == ("abe", 8)
    assert (config.model.embedding_dim, config.data.image_size) == (512, 224)
    assert (config.train.batch_size, config.data.sampler) == (64, "pairs")
    assert (config.data.square, config.augment.crop) == ("pad", "plain")
    assert (config.data.load_size, config.augment.flip) == (256, 0.5)


@pytest.mark.parametrize(("name", "base"), RESNETS.items())
def test_another_trunk_is_all_that_differs(name, base):
    config, usual = (
        importlib.import_module(f"configs.{n}").get_config() for n in (name, base)
    )
    assert (config.model.trunk, usual.model.trunk) == ("resnet50", "googlenet")
    usual.model.update(trunk="resnet50", freeze_batch_norm=True)
    assert config.to_json() == usual.to_json()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in OWN_MODEL)) for n in CONFIGS],
)
def test_one_step(name, photos, data_dir, tmp_path, monkeypatch):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    if name not in OWN_MODEL:
        same = "cub200_resnet50" if name in RESNETS else "cub200"
        other = importlib.import_module(f"configs.{same}").get_config()
        assert config.model.to_json() == other.model.to_json()
        replace_models(monkeypatch)
    is_prepared = config.data.name in PREPARED
    config = shrunk(config, data_dir if is_prepared else photos)
    if is_prepared:
        # So few images that neither a whole batch nor the largest K fits.
        config.train.batch_size = 16
        config.eval.recall_at = config.eval.recall_at[:2]
    metrics = train.train_and_evaluate(config, str(tmp_path / "run"))
    assert 0.0 <= metrics["eval/recall@1"] <= 1.0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    if config.data.name == "inshop":
        assert (evaluation["num_queries"], evaluation["num_gallery"]) == (18, 17)
    elif is_prepared:
        assert evaluation["num_queries"] == evaluation["num_gallery"]
    assert evaluation["protocol"]["box_crop"] == config.data.box_crop
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("mapping", ["shard_map", "pmap"])
def test_mapping_and_pairs_from_the_command_line_fields(
    mapping, photos, tmp_path, monkeypatch
):
    mapped, pmap = [], jax.pmap
    monkeypatch.setattr(jax, "pmap", lambda *a, **k: mapped.append(a) or pmap(*a, **k))
    module = importlib.import_module("configs.quickstart")
    config = shrunk(module.get_config(), photos)
    replace_models(monkeypatch)
    config.data.sampler = "pairs"
    config.parallel.mapping = mapping
    metrics = train.train_and_evaluate(config, str(tmp_path / "run"))
    assert metrics["eval/map_at_r"] >= 0.0
    assert bool(mapped) == (mapping == "pmap")
