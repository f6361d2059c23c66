"""Computes batches some images at a time, so that intermediates fit the cache."""

import jax

# Above and below, left and right of maps.
Pads = tuple[tuple[int, int], tuple[int, int]]

# 4 MB in float32 (measured: 1, 4 and 16): so many values are made at once and used
# before they leave the cache.
CACHED_VALUES = 2**20


def split(x: jax.Array, values_per_image: int, limit: int) -> jax.Array:
    """Splits `[B, ...]` to `[parts, images, ...]`.

    Args:
      x: any batch.
      values_per_image: how many are made of each image at once.
      limit: how many there may be at once; one image is always a part.

    Returns:
      `x`, in as few equal parts as the limit allows.
    """
    sizes = [n for n in range(1, len(x) + 1) if len(x) % n == 0]
    images = max(n for n in sizes if n == 1 or n * values_per_image <= limit)
    return x.reshape(-1, images, *x.shape[1:])


def split_alike(x: jax.Array, parts: jax.Array) -> jax.Array:
    """Splits another batch as `parts` are: `[parts, images, ...]`."""
    return x.reshape(*parts.shape[:2], *x.shape[1:])


def join(parts: jax.Array) -> jax.Array:
    """`[parts, images, ...]` to `[B, ...]`."""
    return parts.reshape(-1, *parts.shape[2:])
