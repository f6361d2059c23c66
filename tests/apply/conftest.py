"""The folder of a run that took no step, and images with awkward names."""

import os
import pathlib
import zipfile
from typing import Any

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import abe_jax
from abe_jax import data, models, optimizer, train_step
from abe_jax.workdir import checkpoints, claim
from configs import quickstart

AWKWARD = (
    b"""quote ' " and <b>&amp;.png""",
    b"line\nbreak.png",
    b"caf\xe9 latin-1.png",
    "émoji 🦜.png".encode(),
)


def make_run(workdir: pathlib.Path, name: str = "abe", trunk: str = "googlenet"):
    """A workdir with a checkpoint of random weights; of a trunk with He's, no two
    images have equal embeddings."""
    config: Any = quickstart.get_config()
    config.update(
        {
            "model": {
                "name": name,
                "trunk": trunk,
                "width": 0.1,
                "num_learners": 2,
                "embedding_dim": 8,
                "pretrained": "long/gone.onnx",
            },
            "data": {
                "image_size": 28 if "patch14" in trunk else 32,
                "load_size": 40,
                "birds_classes": 16,
                "birds_images_per_class": 8,
                "images_per_class": 4,
            },
            "eval": {"batch_size": 2},
            "train": {"batch_size": 16, "steps": 8},
        }
    )
    with config.unlocked():
        section = config.model.copy_and_resolve_references()
        section.pretrained = None
    model = models.create(section, rngs=nnx.Rngs(1))
    optimiser, _ = optimizer.create(config.train)
    workdir.mkdir(parents=True)
    description = data.create(config.data).description()
    claim.claim(workdir, config, description, steered={}, step=0)
    manager = checkpoints.Checkpoints(workdir)
    manager.save(train_step.initial_state(model, optimiser), config)
    manager.close()
    return config


@pytest.fixture(scope="session")
def workdir(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run") / "ende"
    make_run(folder)
    return folder


@pytest.fixture(scope="session")
def model(workdir):
    return abe_jax.load(workdir)


@pytest.fixture
def pictures(tmp_path) -> pathlib.Path:
    """Four loose images with awkward names, two in folders, two in a zip file."""
    folder = tmp_path / "my pictures"
    (folder / "a" / "b").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def save(path: bytes) -> None:
        # Few large squares: pictures that differ.
        pixels = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((48, 36), Image.Resampling.NEAREST)
        with open(path, "wb") as file:
            image.save(file, "PNG")

    for name in (*AWKWARD, b"a/1.png", b"a/b/2.PNG"):
        save(os.path.join(os.fsencode(folder), name))
    with zipfile.ZipFile(folder / "a" / "more.zip", "w") as archive:
        for name in ("in/3.png", "in/4.png", "._3.png"):
            save(os.fsencode(tmp_path / "member"))
            archive.write(tmp_path / "member", name)
    return folder


NAMES = sorted(
    [*map(os.fsdecode, AWKWARD), "a/1.png", "a/b/2.PNG"]
    + ["a/more.zip/in/3.png", "a/more.zip/in/4.png"]
)
