"""The divergence loss between learners (Kim et al., ECCV 2018, section 3.2)."""

import jax
import jax.numpy as jnp

from abe_jax.errors import require_known
from abe_jax.losses.inputs import check_embeddings
from abe_jax.precision import at_least_float32

REDUCTIONS = ("mean", "sum")


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
    check_embeddings(embeddings)
    require_known("reduction", reduction, REDUCTIONS)
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
