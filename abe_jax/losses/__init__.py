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

from abe_jax.errors import require_known
from abe_jax.losses.contrastive import contrastive_loss
from abe_jax.losses.definition import MetricLoss, Sizes, Tree
from abe_jax.losses.divergence import REDUCTIONS, divergence_loss
from abe_jax.losses.multi_similarity import multi_similarity_loss
from abe_jax.losses.proxy_anchor import initial_proxies, proxy_anchor_loss

__all__ = [
    "METRIC_LOSSES",
    "MetricLoss",
    "check",
    "contrastive_loss",
    "divergence_loss",
    "initial_parameters",
    "multi_similarity_loss",
    "proxy_anchor_loss",
    "total",
]


def _contrastive(embeddings, labels, _, config, axis_name: str) -> jax.Array:
    return contrastive_loss(
        embeddings, labels, margin=config.margin, axis_name=axis_name
    )


def _multi_similarity(embeddings, labels, _, config, axis_name: str) -> jax.Array:
    return multi_similarity_loss(
        embeddings, labels, **config.multi_similarity, axis_name=axis_name
    )


def _proxy_anchor(embeddings, labels, own: Tree, config, axis_name: str) -> jax.Array:
    return proxy_anchor_loss(
        embeddings, labels, own["proxies"], **config.proxy_anchor, axis_name=axis_name
    )


# By the names of `config.loss.name`. A new one is a file of its own and a line here.
METRIC_LOSSES: dict[str, MetricLoss] = {
    "contrastive": MetricLoss(_contrastive),
    "multi_similarity": MetricLoss(_multi_similarity),
    "proxy_anchor": MetricLoss(_proxy_anchor, initial_proxies),
}


def initial_parameters(
    config, key: jax.Array, *, num_classes: int, num_learners: int, dim: int
) -> Tree:
    """The own parameters of the loss that `config.name` names, before the first step.

    Args:
      config: the `loss` section of a config.
      key: random key.
      num_classes: of the training classes.
      num_learners: M.
      dim: d, the dimensions of one learner.

    Returns:
      a nested dict of arrays, empty for most losses.
    """
    check(config)
    sizes = Sizes(num_classes, num_learners, dim)
    return METRIC_LOSSES[config.name].initial(key, sizes)


def total(
    embeddings: jax.Array,
    labels: jax.Array,
    own: Tree,
    config,
    *,
    axis_name: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One device's share of the loss that `config.loss` describes.

    Args:
      embeddings: `[B, M, d]`, of unit length for each learner.
      labels: `[B]`, integer, 0 to the number of training classes - 1.
      own: the loss's own parameters, as returned by `initial_parameters`.
      config: the `loss` section of a config (see `configs/default.py`).
      axis_name: mapped axis whose devices hold the rest of the global batch.

    Returns:
      scalar, and its parts by the names of the metrics.
    """
    share = METRIC_LOSSES[config.name].share
    metric = share(embeddings, labels, own, config, axis_name)
    divergence = divergence_loss(
        embeddings,
        margin=config.divergence_margin,
        reduction=config.divergence_reduction,
        axis_name=axis_name,
    )
    loss = metric + config.divergence_weight * divergence
    return loss, {"loss": loss, config.name: metric, "divergence": divergence}


def check(config) -> None:
    """Raises UserError where a `loss` section names what is not there."""
    require_known("loss.name", config.name, METRIC_LOSSES)
    reduction = config.divergence_reduction
    require_known("loss.divergence_reduction", reduction, REDUCTIONS)
