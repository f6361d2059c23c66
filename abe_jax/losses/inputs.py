"""What every loss asks of its arrays: broadcast, wrong shapes would pass silently."""

import jax
import jax.numpy as jnp
import numpy as np


def check_embeddings(embeddings: jax.Array) -> None:
    """Raises ValueError where embeddings are not `[B, M, d]` floating point."""
    shape = getattr(embeddings, "shape", ())
    dtype = getattr(embeddings, "dtype", np.dtype(object))
    if len(shape) != 3 or 0 in shape or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            "embeddings must be a floating point array [images, learners, dimensions], "
            f"none of them 0; these are {_described(embeddings)}. One learner's [B, d] "
            "is [B, 1, d]."
        )


def check_labels(labels: jax.Array, number: int) -> None:
    """Raises ValueError where labels are not `[number]` integers."""
    dtype = getattr(labels, "dtype", np.dtype(object))
    if np.shape(labels) != (number,) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"labels must be an integer array [{number}], one for each image; these "
            f"are {_described(labels)}."
        )


def of_all_devices(
    rows: jax.Array, labels: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Embeddings `[N, M, d]` and labels `[N]` of the global batch, from a device's own.

    Without an axis the device's own are all.
    """
    if axis_name is None:
        return rows, labels
    return (
        jax.lax.all_gather(rows, axis_name, tiled=True),
        jax.lax.all_gather(labels, axis_name, tiled=True),
    )


def _described(array: object) -> str:
    shape = getattr(array, "shape", None)
    if shape is None:
        return f"a {type(array).__name__}"
    return f"{getattr(array, 'dtype', '')} {list(shape)}"
