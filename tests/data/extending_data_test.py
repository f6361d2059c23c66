"""The page on new data sets and samplers: its code is run as it stands."""

import pathlib
import re
import types

import numpy as np
import pytest
from PIL import Image

from abe_jax import data
from abe_jax.data import samplers
from abe_jax.data.datasets import DATASETS
from abe_jax.errors import UserError
from abe_jax.prepare import prepare
from configs import default

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"


def snippets():
    """The code of the two sections."""
    page = PAGE.read_text()
    page = page[page.index("## A data set") : page.index("## A mode")]
    return re.findall(r"```python\n(.*?)```", page, re.S)


def test_both_are_short():
    assert [len(code.splitlines()) < 40 for code in snippets()] == [True, True]


def test_a_data_set(tmp_path, monkeypatch):
    module = types.ModuleType("flowers")
    exec(snippets()[0], module.__dict__)
    monkeypatch.setitem(DATASETS, "flowers", module.DATASET)
    images = tmp_path / "flowers" / "images"
    images.mkdir(parents=True)
    lines = []
    for number in range(12):
        Image.new("RGB", (20, 16), (20 * number, 9, 9)).save(images / f"{number}.jpg")
        lines.append(f"{number}.jpg,{number // 3 + 1}\n")
    (images.parent / "labels.csv").write_text("".join(lines))
    prepare("flowers", tmp_path / "flowers", tmp_path / "data")
    config = default.get_config().data
    config.update(
        name="flowers", path=str(tmp_path / "data"), load_size=16, image_size=16
    )
    splits = data.create(config)
    assert splits.description()["classes"] == {
        "train": {"1": 3, "2": 3},
        "test": {"3": 3, "4": 3},
    }
    assert splits.train[0].shape == (16, 16, 3)
    (images / "3.jpg").unlink()
    with pytest.raises(UserError, match="1 of the 12 images listed in labels.csv"):
        prepare("flowers", tmp_path / "flowers", tmp_path / "other")
    (images.parent / "labels.csv").unlink()
    with pytest.raises(UserError, match="flowers holds no labels.csv; give the whole"):
        prepare("flowers", tmp_path / "flowers", tmp_path / "other")


def test_a_sampler(monkeypatch):
    names = {"np": np, "UserError": UserError}
    exec(snippets()[1], names)
    monkeypatch.setitem(samplers.SAMPLERS, "shuffle", names["ShuffleSampler"])

    def make(batch_size=8):
        return samplers.create(
            np.repeat(np.arange(10), 4),
            name="shuffle",
            batch_size=batch_size,
            images_per_class=4,
            seed=0,
        )

    batches = [make().batch(step) for step in range(10)]
    for epoch in (batches[:5], batches[5:]):
        assert sorted(np.concatenate(epoch)) == list(range(40))
    assert not np.array_equal(batches[0], batches[5])
    with pytest.raises(UserError, match="41 is more than the 40 images"):
        make(batch_size=41)
