"""The contrastive loss of each learner (Kim et al., ECCV 2018, section 3.2)."""

import jax
import jax.numpy as jnp

from abe_jax.losses.inputs import check_embeddings, check_labels, of_all_devices
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

    Raises:
      ValueError: shapes or dtypes are others than these.
    """
    check_embeddings(embeddings)
    check_labels(labels, embeddings.shape[0])
    rows = at_least_float32(embeddings)
    columns, column_labels = of_all_devices(rows, labels, axis_name)
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
