"""Tests of the generated bird data set."""

import pickle

import numpy as np
import pytest

from abe_jax.data.datasets import birds
from abe_jax.data.datasets.bird_drawing import PART_NAMES, PARTS, render
from abe_jax.data.datasets.birds import Birds

GOLDEN_MEANS = {
    0: [109.93, 143.63, 103.59],
    1000: [127.81, 165.69, 133.59],
    1536: [149.83, 158.27, 161.85],
    3071: [120.21, 127.66, 106.05],
}
GOLDEN_ATTRIBUTES = [[3, 1, 0, 4, 0], [2, 2, 3, 4, 3], [1, 4, 1, 0, 0]]


@pytest.fixture(scope="module")
def data() -> Birds:
    return Birds()


def test_shapes_labels_and_names(data: Birds):
    assert len(data) == 128 * 24
    assert data.labels.dtype == np.int32
    np.testing.assert_array_equal(data.labels, np.arange(len(data)) // 24)
    assert data.attributes.shape == (128, len(PART_NAMES))
    assert len(set(data.class_names)) == 128
    assert sorted(data.class_names) == list(data.class_names)
    for name, row in zip(data.class_names, data.attributes, strict=True):
        for part, value in zip(PART_NAMES, row, strict=True):
            assert f"{PARTS[part][value]}-{part}" in name
    assert data.name(31) == f"birds/{data.class_names[1]}/0007.png"
    assert len({data.name(index) for index in range(len(data))}) == len(data)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_images_and_masks_have_the_asked_size(size: int):
    data = Birds(num_classes=4, images_per_class=3, image_size=size)
    image, masks = data[5], data.part_masks(5)
    assert image.dtype == np.uint8 and image.shape == (size, size, 3)
    assert masks.dtype == bool and masks.shape == (len(PART_NAMES), size, size)
    assert image.std() > 10


def test_sizes_show_the_same_scene():
    small = Birds(num_classes=4, image_size=32)
    large = Birds(num_classes=4, image_size=96)
    for index in range(0, len(small), 7):
        shrunk = large[index].reshape(32, 3, 32, 3, 3).mean((1, 3))
        assert np.abs(shrunk - small[index]).mean() < 10


def test_an_image_is_a_function_of_seed_and_index(data: Birds):
    indices = np.random.default_rng(0).permutation(len(data))[:20]
    again = pickle.loads(pickle.dumps(Birds()))
    images = {int(index): again[int(index)] for index in indices}
    for index in sorted(images):
        np.testing.assert_array_equal(data[index], images[index])
        np.testing.assert_array_equal(data[np.int64(index)], images[index])  # pyright: ignore
    assert not np.array_equal(data[0], Birds(seed=1)[0])
    assert not np.array_equal(data[0], data[1])


def test_images_do_not_change_by_accident(data: Birds):
    # Means, as another processor may round single pixels differently. When the
    # drawing is changed on purpose, published results change: update both.
    for index, expected in GOLDEN_MEANS.items():
        found = data[index].mean((0, 1)).tolist()
        assert found == pytest.approx(expected, abs=0.1), index
    assert data.attributes[[0, 64, 127]].tolist() == GOLDEN_ATTRIBUTES


def test_fewer_classes_are_the_beginning_of_more():
    few, many = Birds(num_classes=10, seed=3), Birds(num_classes=40, seed=3)
    assert few.class_names == many.class_names[:10]
    np.testing.assert_array_equal(few[100], many[100])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_classes", [32, 128, 625])
def test_classes_differ_in_two_parts_and_use_every_value(num_classes: int, seed: int):
    attributes = Birds(num_classes=num_classes, seed=seed).attributes
    distances = (attributes[:, None] != attributes[None]).sum(-1)
    assert distances[~np.eye(num_classes, dtype=bool)].min() == 2
    half = num_classes // 2
    for classes in (attributes[:half], attributes[half:]):
        for part in range(len(PART_NAMES)):
            counts = np.bincount(classes[:, part], minlength=birds.NUM_VALUES)
            assert len(counts) == birds.NUM_VALUES
            assert counts.min() >= 1
            assert counts.max() - counts.min() <= 2


def test_masks_are_disjoint_and_parts_visible(data: Birds):
    masks = np.stack([data.part_masks(index) for index in range(0, len(data), 16)])
    assert masks.sum(1).max() == 1
    visible = masks.sum((2, 3))
    assert (visible >= 12).mean() > 0.98
    assert (np.median(visible, axis=0) > 40).all()
    assert (np.median(visible, axis=0) < 64 * 64 / 8).all()


@pytest.mark.parametrize("part", range(len(PART_NAMES)))
def test_a_part_changes_its_own_pixels_only(part: int):
    changed = 0
    for index in range(12):
        attributes = [index % 5, (index + 1) % 5, 2, (index + 3) % 5, index % 3]
        image, parts = render(attributes, 64, seed=0, index=index)
        attributes[part] = (attributes[part] + 1 + index % 4) % 5
        other, other_parts = render(attributes, 64, seed=0, index=index)
        near = _dilate((parts == part) | (other_parts == part))
        difference = np.abs(image.astype(int) - other).max(-1)
        # Pixels that a part covers by less than half belong to no mask.
        assert difference[~near].max() < 60
        assert (difference[~near] > 0).sum() < 10
        changed += int((difference > 20).sum())
    assert changed > 12 * 8


@pytest.mark.slow
def test_raw_pixels_do_not_tell_the_classes(data: Birds):
    # The last half of the classes, as in the zero-shot split, at 16 x 16 pixels.
    start = 64 * 24
    rows = np.stack([_thumbnail(data[i]) for i in range(start, len(data))])
    rows -= rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -np.inf)
    labels = data.labels[start:]
    recall = (labels[similarity.argmax(1)] == labels).mean()
    assert recall < 0.30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 626}, "num_classes is 626, but must be from 1 to 625"),
        ({"num_classes": 0}, "num_classes is 0, but must be from 1 to 625"),
        ({"images_per_class": 0}, "images_per_class is 0, but must be at least 1"),
        ({"image_size": -64}, "image_size is -64, but must be at least 16"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Birds(**arguments)


@pytest.mark.parametrize("index", [-1, 12, 10**6])
def test_an_index_outside_the_range_is_an_index_error(index: int):
    data = Birds(num_classes=4, images_per_class=3)
    for read in (data.__getitem__, data.part_masks, data.name):
        with pytest.raises(IndexError, match=f"index is {index}, .* from 0 to 11"):
            read(index)


def test_iteration_ends():
    assert len(list(Birds(num_classes=2, images_per_class=2, image_size=16))) == 4  # pyright: ignore


def _thumbnail(image: np.ndarray) -> np.ndarray:
    small = image.reshape(16, 4, 16, 4, 3).mean((1, 3)).ravel()
    return small - small.mean()


def _dilate(mask: np.ndarray, by: int = 2) -> np.ndarray:
    padded = np.pad(mask, by)
    size = len(mask)
    shifts = range(2 * by + 1)
    return np.any(
        [padded[y : y + size, x : x + size] for y in shifts for x in shifts], axis=0
    )
