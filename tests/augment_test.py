"""Views of an image: shapes, ranges, and what each setting does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark import load

from abe_jax import augment
from abe_jax.errors import UserError
from configs import default

NOTHING = {
    "crop": "area",
    "crop_area": (1.0, 1.0),
    "crop_aspect": 1.0,
    "flip": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "grey": 0.0,
    "erase": 0.0,
}


def views(images, size=16, seed=0, step=0, **settings):
    config = default.get_config().augment
    config.update({**NOTHING, **settings})
    keys = augment.image_keys(seed, jnp.int32(step), jnp.arange(len(images)))
    return np.asarray(augment.augment(jnp.asarray(images), keys, size, config))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8)


def test_nothing_changes_nothing(images):
    np.testing.assert_allclose(views(images), images, atol=0.01)


def test_flip_is_left_to_right(images):
    np.testing.assert_allclose(views(images, flip=1.0), images[:, :, ::-1], atol=0.01)
    some = views(images, flip=0.5)
    flipped = [
        np.allclose(a, b[:, ::-1], atol=0.01) for a, b in zip(some, images, strict=True)
    ]
    assert 4 < sum(flipped) < 28


def test_crop_shows_a_part_of_the_image():
    ramp = np.broadcast_to(np.arange(64.0)[None, None, :, None], (32, 64, 64, 3))
    shown = views(ramp, size=32, crop_area=(0.25, 0.25))
    widths = shown[:, 0, -1, 0] - shown[:, 0, 0, 0]
    np.testing.assert_allclose(widths, 31.0, atol=0.01)  # half the side: 32 pixels
    assert np.ptp(shown[:, 0, 0, 0]) > 10  # at different places
    assert shown.min() >= 0 and shown.max() <= 63


def test_a_plain_crop_copies_pixels(images):
    """The paper's: no resizing, any place alike, and a flip."""
    size, shown = 12, views(images, size=12, crop="plain")
    places = set()
    for image, view in zip(images, shown, strict=True):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.allclose(image[top : top + size, left : left + size], view, atol=0.01)
        ]
        assert len(found) == 1
        places.add(found[0])
    assert {0, 4} <= {top for top, _ in places} & {left for _, left in places}
    flipped = views(images, size=size, crop="plain", flip=1.0)
    np.testing.assert_allclose(flipped, shown[:, :, ::-1], atol=0.01)
    np.testing.assert_allclose(views(images, crop="plain"), images, atol=0.01)


def test_an_unknown_crop(images):
    with pytest.raises(
        UserError, match="'random'; known are 'area', 'plain', 'centre'"
    ):
        views(images, crop="random")


def test_zooming_out_repeats_the_edge():
    image = np.full((4, 16, 16, 3), 90, np.uint8)
    np.testing.assert_allclose(views(image, crop_area=(1.5, 2.0)), 90.0, atol=0.01)


def test_zooming_out_and_shrinking_repeat_the_edge_alone():
    image = np.full((1, 64, 64, 3), 255, np.uint8)
    image[:, :, 0] = image[:, :, -1] = 0
    seen = views(image, size=16, crop_area=(4.0, 4.0))
    # Half of the view and more lies outside: the columns there are those of the edges.
    outside = (seen < 1).all(axis=(0, 1, 3))
    assert outside[[0, -1]].any() and 6 <= outside.sum() <= 10


def test_colours_that_do_not_change_cost_nothing(images):
    """Products of matrices are not exact on every device: there is none."""
    equations = load("model_sizes").equations
    config = default.get_config().augment
    config.update({**NOTHING, "crop": "plain"})
    keys = augment.image_keys(0, jnp.int32(0), jnp.arange(len(images)))

    def of(config):
        traced = jax.make_jaxpr(lambda x, k: augment.augment(x, k, 16, config))
        program = traced(jnp.asarray(images), keys).jaxpr
        products = (e for e in equations(program) if e.primitive.name == "dot_general")
        return [product.params["precision"] for product in products]

    assert not of(config)
    config.hue = 0.1
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert set(of(config)) == {highest}


def test_shrinking_averages():
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    image = np.repeat(checker[None, :, :, None], 3, axis=-1).astype(np.uint8)
    np.testing.assert_allclose(views(image, size=8)[0, 1:-1, 1:-1], 127.5, atol=8)


def test_grey_has_no_colour(images):
    grey = views(images, grey=1.0)
    np.testing.assert_allclose(grey[..., 0], grey[..., 1], atol=0.5)
    np.testing.assert_allclose(grey[..., 0], grey[..., 2], atol=0.5)
    luma = images @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey[..., 0], luma, atol=1.0)


def test_hue_keeps_luma():
    image = np.broadcast_to(np.array([150, 110, 120], np.uint8), (32, 16, 16, 3))
    turned = views(image, hue=1.0)
    weights = np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(turned @ weights, image @ weights, atol=0.5)
    assert np.ptp(turned[:, 0, 0, 0]) > 20


def test_erase_covers_a_rectangle_with_one_grey():
    image = np.broadcast_to(np.array([200, 10, 10], np.uint8), (32, 16, 16, 3))
    covered = np.abs(views(image, erase=1.0) - image).max(-1) > 1
    shares = covered.mean((1, 2))
    assert shares.min() > 0.0 and shares.max() <= 0.5**2 * 1.3
    for mask in covered:
        assert mask[np.ix_(mask.any(1), mask.any(0))].all()


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_range_is_kept(images, name):
    changed = views(images, **{name: 1.0})
    assert changed.min() >= 0.0 and changed.max() <= 255.0
    assert np.abs(changed - images).mean() > 5


def test_draws_depend_on_seed_step_and_position(images):
    same = np.repeat(images[:1], 32, axis=0)
    settings = {"crop_area": (0.3, 1.0), "brightness": 0.2}
    first = views(same, **settings)
    np.testing.assert_array_equal(first, views(same, **settings))
    assert len(np.unique(first.reshape(32, -1), axis=0)) == 32
    assert not np.allclose(first, views(same, step=1, **settings))
    assert not np.allclose(first, views(same, seed=1, **settings))


def test_centre_crop(images):
    np.testing.assert_array_equal(
        augment.centre_crop(jnp.asarray(images), 8), images[:, 4:12, 4:12]
    )
    with pytest.raises(
        ValueError, match=r"\(16, 16\) pixels have no middle of 17 x 17"
    ):
        augment.centre_crop(jnp.asarray(images), 17)


def test_keys_do_not_depend_on_how_positions_are_split():
    whole = augment.image_keys(0, jnp.int32(3), jnp.arange(8))
    parts = [augment.image_keys(0, jnp.int32(3), jnp.arange(4) + 4 * i) for i in (0, 1)]
    np.testing.assert_array_equal(
        jax.random.key_data(whole), np.concatenate([*map(jax.random.key_data, parts)])
    )
