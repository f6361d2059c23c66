"""Published weights as a library: files that people have, to a trunk or a model."""

import os

from flax import nnx, traverse_util

from abe_jax.errors import UserError
from abe_jax.models import weights
from abe_jax.models.googlenet import GoogLeNet, GoogLeNetForm
from abe_jax.models.shapes import without_values
from abe_jax.models.weights import initialize

__all__ = ["initialize", "load_googlenet"]


def load_googlenet(path: str | os.PathLike[str]) -> GoogLeNet:
    """Reads a GoogLeNet from a file; its form, BVLC's or torchvision's, is the file's.

    Args:
      path: file, or one on the hub; see `weight_files.read`.

    Returns:
      a trunk of width 1 with the file's weights, in inference mode: batch norm, which
      only torchvision's form has, uses its running averages. To train, in a program
      mapped over an axis "data", take `nnx.view(trunk, use_running_average=False)`,
      which uses the statistics of the batch.

    Raises:
      UserError: the file cannot be read, is another network's, or holds values that
        are not float32 or not finite; or the package that reads it is missing.
    """
    form, values = weights.read(path)
    if not isinstance(form, GoogLeNetForm):
        raise UserError(f"{path} holds a {form.name!r}, not a GoogLeNet.")
    model = without_values(lambda rngs: GoogLeNet(form, rngs=rngs))
    graphdef, state = nnx.split(model)
    found = {key: values[key[1:]] for key in weights.flat(state)}
    return nnx.merge(graphdef, nnx.State(traverse_util.unflatten_dict(found)))
