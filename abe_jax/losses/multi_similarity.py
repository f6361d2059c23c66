"""The multi-similarity loss of each learner, with its mining of pairs.

Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric
Learning", CVPR 2019: equations 9 and 10 choose pairs, equation 13 weighs them.
"""

import jax
import jax.numpy as jnp

from abe_jax.losses.inputs import check_embeddings, check_labels, of_all_devices
from abe_jax.losses.sums import log_one_plus_sum
from abe_jax.precision import at_least_float32


def multi_similarity_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
    axis_name: str | None = None,
) -> jax.Array:
    """Multi-similarity loss, summed over the learners.

    For each anchor, only those negatives count whose similarity is above that of its
    least similar positive minus `epsilon`, and only those positives whose similarity is
    below that of its most similar negative plus `epsilon`.

    Args:
      embeddings: `[B, M, d]`, floating point, of unit length for each learner.
      labels: `[B]`, integer class of each image.
      alpha: weight of positives' similarities; the default is the paper's.
      beta: weight of negatives' similarities; the default is the paper's.
      base: similarity around which both turn, the paper's lambda; the default is that
        of pytorch-metric-learning, which gives 1 as the paper's.
      epsilon: of the mining; the default is the paper's.
      axis_name: mapped axis whose devices hold the rest of the global batch.

    Returns:
      scalar; with `axis_name`, this device's anchors against all images, divided by
      the number of images of the global batch.

    Raises:
      ValueError: shapes or dtypes are others than these.
    """
    check_embeddings(embeddings)
    check_labels(labels, embeddings.shape[0])
    anchors = at_least_float32(embeddings)
    everyone, their_labels = of_all_devices(anchors, labels, axis_name)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(labels)
    similarities = jnp.einsum(
        "imd,jmd->mij", anchors, everyone, precision=jax.lax.Precision.HIGHEST
    )
    same = labels[:, None] == their_labels[None, :]
    rows = first + jnp.arange(len(labels), dtype=jnp.int32)
    columns = jnp.arange(len(their_labels), dtype=jnp.int32)
    itself = rows[:, None] == columns[None, :]
    positive, negative = (same & ~itself)[None], ~same[None]

    mined = jax.lax.stop_gradient(similarities)
    least = jnp.min(mined, axis=2, where=positive, initial=jnp.inf, keepdims=True)
    most = jnp.max(mined, axis=2, where=negative, initial=-jnp.inf, keepdims=True)
    positive &= mined - epsilon < most
    negative &= mined + epsilon > least

    from_base = similarities - base
    of_positives = log_one_plus_sum(-alpha * from_base, positive, axis=2) / alpha
    of_negatives = log_one_plus_sum(beta * from_base, negative, axis=2) / beta
    return jnp.sum(of_positives + of_negatives) / everyone.shape[0]
