"""Batch norm as PyTorch and TensorFlow train it, and frozen."""

import jax
import jax.numpy as jnp
from flax import nnx

from abe_jax.precision import at_least_float32

DATA_AXIS = "data"  # that of `abe_jax.parallel`, which no model imports


class BatchNorm(nnx.BatchNorm):
    """Batch norm over `[..., C]` whose running variance is the unbiased one.

    A batch is normalised by its own biased variance, but the running average collects
    `n / (n - 1)` times that, with n the positions of the global batch: as in PyTorch;
    Flax collects the biased one. Statistics are float32, of the global batch over
    the mapped axis `DATA_AXIS`, whose devices hold its parts.

    Frozen, it uses the running averages in training too and never changes them. Its
    scale and bias still train: that is PyTorch's `eval()` on the layer, and what most
    recipes of metric learning do.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-3,
        frozen: bool,
        rngs: nnx.Rngs,
    ):
        """Makes a layer with running averages 0 and 1, which it uses.

        To train, `nnx.view(model, use_running_average=False)`.

        Args:
          num_features: C.
          epsilon: added to the variance; TensorFlow's by default.
          frozen: True to use the running averages in training.
          rngs: asked by Flax; scale starts at 1, bias at 0.
        """
        super().__init__(
            num_features,
            use_running_average=True,
            momentum=0.9,
            epsilon=epsilon,
            axis_name=DATA_AXIS,
            rngs=rngs,
        )
        self.frozen = frozen

    def __call__(self, x: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalises `[..., C]`, and updates the running averages in training."""
        if self.frozen or self.use_running_average:
            mean, variance = self.mean[...], self.var[...]
        else:
            mean, variance = self._batch_statistics(x)
        assert self.scale is not None and self.bias is not None  # for type checkers
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]

        def aligned(channels: jax.Array) -> jax.Array:
            return jnp.expand_dims(channels, range(x.ndim - 1))

        # In float32, rounded once: forward the fusion costs nothing, and backward the
        # sums over all positions are float32 too.
        y = (at_least_float32(x) - aligned(mean)) * aligned(factor)
        return (y + aligned(self.bias[...])).astype(x.dtype)

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes = tuple(range(x.ndim - 1))
        values = at_least_float32(x)
        # Each device's own deviations first: the mean square minus the squared mean
        # would cancel where a channel's mean is large.
        mean, variance = jnp.mean(values, axes), jnp.var(values, axes)
        if jax.lax.axis_size(self.axis_name) > 1:
            means, variances = jax.lax.all_gather((mean, variance), self.axis_name)
            mean = jnp.mean(means, 0)
            variance = jnp.mean(variances + jnp.square(means - mean[None]), 0)
        count = x.size // x.shape[-1] * jax.lax.axis_size(self.axis_name)
        unbiased = variance * (count / max(count - 1, 1))
        # Not by `self.mean[...] =`, which asks a tracer for its sharding: that takes as
        # long as all other tracing.
        new = 1.0 - self.momentum
        self.mean.set_value(self.momentum * self.mean[...] + new * mean)
        self.var.set_value(self.momentum * self.var[...] + new * unbiased)
        return mean, variance
