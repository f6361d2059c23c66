"""Attention-based Ensemble for Deep Metric Learning (ABE) in JAX and Flax."""

import os
import typing

if typing.TYPE_CHECKING:
    from abe_jax.apply.trained import Trained

__version__ = "0.1.0"


def load(workdir: str | os.PathLike[str], step: int | None = None) -> "Trained":
    """Opens a trained model from the folder of its run alone.

    No config, file of pretrained weights or data set is needed, and any number of
    devices will do.

    Args:
      workdir: folder of the run, or a copy of it.
      step: of the checkpoint; the newest by default.

    Raises:
      UserError: there is no such run or checkpoint, or it is damaged.
    """
    from abe_jax.apply.trained import Trained  # not above: `import abe_jax` is quick

    return Trained(workdir, step)
