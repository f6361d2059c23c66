"""The losses of ABE (Kim et al., ECCV 2018, section 3.2), in float32 or wider.

    L        = sum_m L_metric,m + lambda_div * L_div
    L_metric = 1/N sum_{i,j} (1 - y_ij) [margin - D2_ij]_+  +  y_ij D2_ij
    L_div    = sum_i sum_{p<q} [margin - D2(B_p(x_i), B_q(x_i))]_+     (over N: below)

D2 is the squared Euclidean distance and y_ij = 1 for equal labels; i and j run over all
ordered pairs of the global batch of N images. The paper prints L_div without 1/N beside
L_metric with it; `reduction` chooses. With "mean", which is ours, lambda_div does not
depend on the batch size: at N = 64, 1 means what 0.016 would as printed.

With `axis_name` a function is one device's program: it takes the device's own images
and returns the device's share of the loss. The shares add up to the loss, and the
gradient of the share, summed over the devices, is the gradient of the loss: never
differentiate a psum of it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from abe_jax.precision import at_least_float32

REDUCTIONS = ("mean", "sum")


def contrastive_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    *,
    margin: float = 1.0,
    axis_name: str | None = None,
) -> jax.Array:
    """Contrastive loss of each learner over all pairs, summed over the learners.

    Args:
      embeddings: `[B, M, d]`, floating point.
      labels: `[B]`, integer class of each image.
      margin: squared distance beyond which a negative pair costs nothing.
      axis_name: mapped axis whose devices hold the rest of the global batch.

    Returns:
      scalar; with `axis_name`, this device's rows of the pair matrix against all
      columns, divided by the number of images of the global batch.

    Raises:
      ValueError: shapes or dtypes are others than these.
    """
    _check_embeddings(embeddings)
    _check_labels(labels, embeddings.shape[0])
    rows = at_least_float32(embeddings)
    columns, column_labels = rows, labels
    if axis_name is not None:
        columns = jax.lax.all_gather(rows, axis_name, tiled=True)
        column_labels = jax.lax.all_gather(labels, axis_name, tiled=True)
    # |a - b|^2 from inner products: memory is rows x columns, not times d.
    products = jnp.einsum(
        "imd,jmd->mij", rows, columns, precision=jax.lax.Precision.HIGHEST
    )
    row_squares = jnp.sum(jnp.square(rows), axis=-1).T[:, :, None]
    column_squares = jnp.sum(jnp.square(columns), axis=-1).T[:, None, :]
    distances = row_squares + column_squares - 2.0 * products
    positive = labels[:, None] == column_labels[None, :]
    pairs = jnp.where(positive, distances, jax.nn.relu(margin - distances))
    return jnp.sum(pairs) / columns.shape[0]


def divergence_loss(
    embeddings: jax.Array,
    *,
    margin: float = 1.0,
    reduction: str = "mean",
    axis_name: str | None = None,
) -> jax.Array:
    """Keeps the learners' embeddings of the same image apart.

    Args:
      embeddings: `[B, M, d]`, floating point.
      margin: squared distance beyond which two learners cost nothing.
      reduction: over the images, "sum" (as printed in the paper) or "mean" (ours).
      axis_name: mapped axis whose devices hold the rest of the global batch.

    Returns:
      scalar; with `axis_name`, the share of this device's images. Zero for M = 1.

    Raises:
      ValueError: the embeddings have another shape or dtype, or the reduction another
        name.
    """
    _check_embeddings(embeddings)
    if reduction not in REDUCTIONS:
        known = " and ".join(map(repr, REDUCTIONS))
        raise ValueError(f"reduction is {reduction!r}; known are {known}.")
    rows = at_least_float32(embeddings)
    learners = rows.shape[1]
    products = jnp.einsum(
        "bpd,bqd->bpq", rows, rows, precision=jax.lax.Precision.HIGHEST
    )
    squares = jnp.sum(jnp.square(rows), axis=-1)
    distances = squares[:, :, None] + squares[:, None, :] - 2.0 * products
    upper = jnp.triu(jnp.ones((learners, learners), bool), k=1)[None]
    pairs = jnp.where(upper, jax.nn.relu(margin - distances), 0.0)
    if reduction == "sum":
        return jnp.sum(pairs)
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    return jnp.sum(pairs) / (rows.shape[0] * devices)


def _check_embeddings(embeddings: jax.Array) -> None:
    shape = getattr(embeddings, "shape", ())
    dtype = getattr(embeddings, "dtype", np.dtype(object))
    if len(shape) != 3 or 0 in shape or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            "embeddings must be a floating point array [images, learners, dimensions], "
            f"none of them 0; these are {_described(embeddings)}. One learner's [B, d] "
            "is [B, 1, d]."
        )


def _check_labels(labels: jax.Array, number: int) -> None:
    dtype = getattr(labels, "dtype", np.dtype(object))
    if np.shape(labels) != (number,) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"labels must be an integer array [{number}], one for each image; these "
            f"are {_described(labels)}."
        )


def _described(array: object) -> str:
    shape = getattr(array, "shape", None)
    if shape is None:
        return f"a {type(array).__name__}"
    return f"{getattr(array, 'dtype', '')} {list(shape)}"
