"""The Proxy-Anchor loss of each learner: a learned proxy for each training class.

Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, equation 4.
"""

import jax
import jax.numpy as jnp

from abe_jax.losses.definition import Sizes, Tree
from abe_jax.losses.inputs import check_embeddings, check_labels, of_all_devices
from abe_jax.losses.sums import log_one_plus_sum
from abe_jax.precision import at_least_float32


def initial_proxies(key: jax.Array, sizes: Sizes) -> Tree:
    """Random proxies, `{"proxies": [M, num_classes, d]}`, of Kaiming's variance."""
    shape = (sizes.num_learners, sizes.num_classes, sizes.dim)
    scale = (2.0 / sizes.num_classes) ** 0.5
    return {"proxies": scale * jax.random.normal(key, shape)}


def proxy_anchor_loss(
    embeddings: jax.Array,
    labels: jax.Array,
    proxies: jax.Array,
    *,
    margin: float = 0.1,
    alpha: float = 32.0,
    axis_name: str | None = None,
) -> jax.Array:
    """Proxy-Anchor loss, summed over the learners.

    Args:
      embeddings: `[B, M, d]`, floating point, of unit length for each learner.
      labels: `[B]`, integer class of each image, 0 to num_classes - 1.
      proxies: `[M, num_classes, d]`, of any length but zero.
      margin: the paper's delta, of similarities.
      alpha: the paper's scale.
      axis_name: mapped axis whose devices hold the rest of the global batch.

    Returns:
      scalar; with `axis_name`, the share of this device, which takes its part of the
      proxies against all images.

    Raises:
      ValueError: shapes or dtypes are others than these.
    """
    check_embeddings(embeddings)
    check_labels(labels, embeddings.shape[0])
    if proxies.ndim != 3 or proxies.shape[::2] != embeddings.shape[1:]:
        raise ValueError(
            f"proxies must be [learners, classes, dimensions] of embeddings "
            f"{list(embeddings.shape)}; these are {list(proxies.shape)}."
        )
    images = at_least_float32(embeddings)
    # Labels of few bits cannot count all classes.
    images, labels = of_all_devices(images, labels.astype(jnp.int32), axis_name)
    classes = proxies.shape[1]
    first, number = 0, classes
    if axis_name is not None:
        number = -(-classes // jax.lax.axis_size(axis_name))
        first = jax.lax.axis_index(axis_name) * number
    own = first + jnp.arange(number, dtype=jnp.int32)
    exists = own < classes  # the last device may have fewer
    taken = jnp.take(proxies, jnp.minimum(own, classes - 1), axis=1)
    lengths = jnp.linalg.norm(taken, axis=-1, keepdims=True)
    similarities = jnp.einsum(
        "mpd,jmd->mpj",
        (taken / lengths).astype(images.dtype),
        images,
        precision=jax.lax.Precision.HIGHEST,
    )
    positive = own[:, None] == labels[None, :]
    negative = ~positive & exists[:, None]
    with_positive = jnp.zeros(classes, images.dtype).at[labels].set(1).sum()
    pulled = log_one_plus_sum(-alpha * (similarities - margin), positive[None], axis=2)
    pushed = log_one_plus_sum(alpha * (similarities + margin), negative[None], axis=2)
    return jnp.sum(pulled) / with_positive + jnp.sum(pushed) / classes
