"""Batch norm as PyTorch and TensorFlow train it, and frozen."""

import jax
from flax import nnx


class BatchNorm(nnx.BatchNorm):
    """Batch norm over `[..., C]` whose running variance is the unbiased one.

    A batch is normalised by its own biased variance, but the running average collects
    `n / (n - 1)` times that, with n the positions of the global batch: as in PyTorch;
    Flax collects the biased one. Statistics are those of the global batch over the
    mapped axis.

    Frozen, it uses the running averages in training too and never changes them. Its
    scale and bias still train: that is PyTorch's `eval()` on the layer, and what most
    recipes of metric learning do.
    """

    def __init__(
        self, num_features: int, *, axis_name: str, frozen: bool, rngs: nnx.Rngs
    ):
        """Makes a layer with running averages 0 and 1.

        Args:
          num_features: C.
          axis_name: mapped axis whose devices hold the rest of the global batch.
          frozen: True to use the running averages in training.
          rngs: asked by Flax; scale starts at 1, bias at 0.
        """
        super().__init__(
            num_features, momentum=0.9, epsilon=1e-3, axis_name=axis_name, rngs=rngs
        )
        self.frozen = frozen

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        if use_running_average is None:
            use_running_average = self.use_running_average
        if self.frozen or use_running_average:
            return super().__call__(x, use_running_average=True, mask=mask)
        if mask is not None:
            raise NotImplementedError("The running variance of a masked batch.")
        before = self.momentum * self.var[...]
        y = super().__call__(x, use_running_average=False)
        count = x.size // x.shape[-1] * jax.lax.axis_size(self.axis_name)
        update = self.var[...] - before
        self.var[...] = before + update * (count / max(count - 1, 1))
        return y
