"""Random crops, flips and colours, on the device, inside the step.

Images are RGB, values 0 to 255. Every draw depends on the given keys only, one key an
image, so that a run gives the same images on any number of devices.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from abe_jax.errors import require_known
from abe_jax.precision import working_dtype

CROPS = ("area", "plain", "centre")
# Changes beside the crop: each does nothing at 0.
_COLOURS = ("brightness", "contrast", "saturation", "hue", "grey")
_CHANGES = ("flip", *_COLOURS, "erase")

# RGB to luma and two chroma axes (NTSC's YIQ): hue is the angle in the chroma plane.
_TO_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
)
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def image_keys(seed: int, step: jax.Array, positions: jax.Array) -> jax.Array:
    """One key an image from (seed, step, position in the global batch).

    Args:
      seed: of the run.
      step: scalar int32.
      positions: `[B]` int32.

    Returns:
      typed keys `[B]`.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def augment(images: jax.Array, keys: jax.Array, size: int, config) -> jax.Array:
    """Draws one training view of each image.

    Args:
      images: `[B, H, W, 3]`, any real dtype, 0 to 255.
      keys: typed keys `[B]`, as returned by `image_keys`.
      size: side of the views, pixels.
      config: the `augment` section of a config (see `configs/default.py`).

    Returns:
      float32 `[B, size, size, 3]`, 0 to 255.

    Raises:
      UserError: `config.crop` is unknown.
    """
    require_known("augment.crop", config.crop, CROPS)

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        crop_key, colour_key, erase_key = jax.random.split(key, 3)
        view = _crop(image.astype(working_dtype()), crop_key, size, config)
        view = jnp.clip(_recolour(view, colour_key, config), 0.0, 255.0)
        return _erase(view, erase_key, config)

    return jax.vmap(one)(images, keys)


def changes_nothing(config) -> bool:
    """Whether every training view is the unchanged centre crop that evaluation uses.

    Args:
      config: the `augment` section of a config.
    """
    return config.crop == "centre" and not any(config[name] for name in _CHANGES)


def centre_crop(images: jax.Array, size: int) -> jax.Array:
    """The middle `[B, size, size, 3]` of images `[B, H, W, 3]`, float32 at least.

    Raises:
      ValueError: the images are smaller.
    """
    if size > min(images.shape[1:3]):
        raise ValueError(
            f"{images.shape[1:3]} pixels have no middle of {size} x {size}."
        )
    top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
    return images[:, top : top + size, left : left + size].astype(working_dtype())


def _crop(image: jax.Array, key: jax.Array, size: int, config) -> jax.Array:
    keys = jax.random.split(key, 4)
    flip = jax.random.uniform(keys[3], ()) < config.flip
    if config.crop == "plain":
        return _plain_crop(image, keys[2], size, flip)
    if config.crop == "centre":
        view = centre_crop(image[None], size)[0]
        return jnp.where(flip, view[:, ::-1], view)
    return _area_crop(image, keys[:3], size, flip, config)


def _plain_crop(
    image: jax.Array, key: jax.Array, size: int, flip: jax.Array
) -> jax.Array:
    """`size` pixels each way, anywhere in the image (paper)."""
    room = jnp.array([image.shape[0] - size, image.shape[1] - size], jnp.int32)
    top, left = jax.random.randint(key, (2,), 0, room + 1)
    view = jax.lax.dynamic_slice(image, (top, left, 0), (size, size, image.shape[2]))
    return jnp.where(flip, view[:, ::-1], view)


def _area_crop(
    image: jax.Array, keys: jax.Array, size: int, flip: jax.Array, config
) -> jax.Array:
    """A random window, resized to a square; pixels outside repeat the edge.

    Resizing is two matrix products, which every accelerator is fast at.
    """
    height, width, _ = image.shape
    area_key, aspect_key, place_key = keys
    low, high = config.crop_area
    scale = jnp.sqrt(jax.random.uniform(area_key, (), minval=low, maxval=high))
    stretch = math.log(config.crop_aspect) / 2
    ratio = jnp.exp(jax.random.uniform(aspect_key, (), minval=-stretch, maxval=stretch))
    window = scale * jnp.stack([height / ratio, width * ratio])
    room = jnp.array([height, width], window.dtype) - window
    start = room * jax.random.uniform(place_key, (2,))
    rows = _resample(start[0], window[0], height, size)
    columns = _resample(start[1], window[1], width, size)
    columns = jnp.where(flip, columns[::-1], columns)
    return jnp.einsum("ih,hwc,jw->ijc", rows, image, columns, precision="highest")


def _resample(start: jax.Array, extent: jax.Array, length: int, size: int) -> jax.Array:
    """Weights `[size, length]` of a triangle filter, widened when it shrinks."""
    step = extent / size
    centres = start + (jnp.arange(size, dtype=step.dtype) + 0.5) * step - 0.5
    inside = jnp.clip(centres, 0.0, length - 1.0)
    pixels = jnp.arange(length, dtype=step.dtype)
    # Outside the image the filter narrows, down to the edge pixel alone.
    reach = jnp.maximum(jnp.maximum(step, 1.0) - jnp.abs(centres - inside), 1.0)
    distances = jnp.abs(pixels[None] - inside[:, None])
    weights = jax.nn.relu(1.0 - distances / reach[:, None])
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _recolour(image: jax.Array, key: jax.Array, config) -> jax.Array:
    """Brightness, contrast, saturation, hue and grey as one affine map of colours."""
    if not any(config[name] for name in _COLOURS):
        return image
    keys = jax.random.split(key, 5)

    def symmetric(key: jax.Array, reach: float) -> jax.Array:
        return jax.random.uniform(key, (), minval=-reach, maxval=reach)

    offset = 255.0 * symmetric(keys[0], config.brightness)
    contrast = 1.0 + symmetric(keys[1], config.contrast)
    saturation = 1.0 + symmetric(keys[2], config.saturation)
    grey = jax.random.uniform(keys[3], ()) < config.grey
    saturation = jnp.where(grey, 0.0, saturation)
    angle = math.pi * symmetric(keys[4], config.hue)
    cos, sin = saturation * jnp.cos(angle), saturation * jnp.sin(angle)
    turn = jnp.zeros((3, 3)).at[0, 0].set(1.0)
    turn = turn.at[1:, 1:].set(jnp.array([[cos, -sin], [sin, cos]]))
    colours = jnp.einsum("ij,jk,kl->il", _FROM_YIQ, turn, _TO_YIQ, precision="highest")
    middle = jnp.mean(image)
    changed = jnp.einsum(
        "hwc,dc->hwd", image - middle, contrast * colours, precision="highest"
    )
    return changed + middle + offset


def _erase(image: jax.Array, key: jax.Array, config) -> jax.Array:
    """Covers one random rectangle with a random grey (Zhong et al., 2020)."""
    if not config.erase:
        return image
    size = image.shape[0]
    chance_key, side_key, place_key, grey_key = jax.random.split(key, 4)
    sides = size * jax.random.uniform(side_key, (2,), minval=0.1, maxval=0.5)
    start = (size - sides) * jax.random.uniform(place_key, (2,))
    pixels = jnp.arange(size, dtype=start.dtype)[None]
    inside = (pixels >= start[:, None]) & (pixels < (start + sides)[:, None])
    covered = inside[0][:, None] & inside[1][None, :]
    covered &= jax.random.uniform(chance_key, ()) < config.erase
    grey = 255.0 * jax.random.uniform(grey_key, ())
    return jnp.where(covered[:, :, None], grey, image)
