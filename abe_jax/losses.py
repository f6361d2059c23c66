"""The losses of ABE (Kim et al., ECCV 2018, section 3.2), in float32 or wider.

    L        = sum_m L_metric,m + lambda_div * L_div
    L_metric = 1/N sum_{i,j} (1 - y_ij) [margin - D2_ij]_+  +  y_ij D2_ij
    L_div    = 1/N sum_i sum_{p<q} [margin - D2(B_p(x_i), B_q(x_i))]_+

D2 is the squared Euclidean distance and y_ij = 1 for equal labels; i and j run over all
ordered pairs of the global batch of N images. The 1/N of L_div is a choice of ours: it
makes lambda_div independent of the batch size.

With `axis_name` a function is one device's program: it takes the device's own images
and returns the device's share of the loss. The shares add up to the loss, and the
gradient of the share, summed over the devices, is the gradient of the loss: never
differentiate a psum of it.
"""

import jax
import jax.numpy as jnp

from abe_jax.precision import at_least_float32


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
    """
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
    embeddings: jax.Array, *, margin: float = 1.0, axis_name: str | None = None
) -> jax.Array:
    """Keeps the learners' embeddings of the same image apart.

    Args:
      embeddings: `[B, M, d]`, floating point.
      margin: squared distance beyond which two learners cost nothing.
      axis_name: mapped axis whose devices hold the rest of the global batch.

    Returns:
      scalar; with `axis_name`, the share of this device's images. Zero for M = 1.
    """
    rows = at_least_float32(embeddings)
    learners = rows.shape[1]
    products = jnp.einsum(
        "bpd,bqd->bpq", rows, rows, precision=jax.lax.Precision.HIGHEST
    )
    squares = jnp.sum(jnp.square(rows), axis=-1)
    distances = squares[:, :, None] + squares[:, None, :] - 2.0 * products
    upper = jnp.triu(jnp.ones((learners, learners), bool), k=1)[None]
    pairs = jnp.where(upper, jax.nn.relu(margin - distances), 0.0)
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    return jnp.sum(pairs) / (rows.shape[0] * devices)
