"""Published weights, read from the files in which people have them.

    .onnx          the ONNX model zoo's BVLC GoogLeNet    needs `onnx`
    .safetensors   a state dict of torchvision or timm    needs `safetensors`
    .pth, .pt      the same, as `torch.save` writes it    needs `torch`
    hf://...       such a file on the Hugging Face hub    needs `huggingface_hub`

Each trunk's `namings` tell where each tensor of a file goes. A file is taken whole or
not at all: a missing, unknown or wrongly shaped tensor is an error, as is any dtype but
float32 (half precision has lost digits that training starts from) and any value that is
not finite. Classifiers are left out. No code of a file is run (see `weight_files`).
"""

import collections
import dataclasses
import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from abe_jax.errors import UserError
from abe_jax.models import hub, weight_files
from abe_jax.models.embedder import Embedder
from abe_jax.models.naming import Naming, Path
from abe_jax.models.shapes import without_values
from abe_jax.models.trunk import Trunk
from abe_jax.models.trunks import TRUNKS
from abe_jax.models.weight_files import Tensor

_log = logging.getLogger(__name__)

# Kernels are [out, in, h, w] and [out, in] in every file, and in Flax [h, w, in, out]
# and [in, out]: by rank, the file's axes in Flax's order.
_FROM_FILE = {4: (2, 3, 1, 0), 2: (1, 0)}

# Attributes of models that hold a section of a trunk.
_SECTIONS = frozenset({"spatial", "global_features", "common"})

# So many wrong tensors are named in an error.
_NAMED = 3


def layer_of(path: Path) -> Path | None:
    """Where in its trunk a model's variable is.

    Args:
      path: keys of a variable in the pure dict of a model's state, such as
        `("attention_branch", "common", "inception_4a", "one", "conv", "kernel")`.

    Returns:
      the path within its section, equal in all sections; None for a layer that no
      published network has.
    """
    for place, name in enumerate(path):
        if name in _SECTIONS:
            return path[place + 1 :]
    return None


def is_new_layer(path: Path) -> bool:
    """Whether a parameter belongs to a layer that no published network has.

    Args:
      path: see `layer_of`; e.g. `("attention_branch", "last", "kernel")`.
    """
    return layer_of(path) is None


def read(
    path: str | os.PathLike[str], trunk_name: str | None = None
) -> tuple[Trunk, dict[Path, jax.Array]]:
    """Reads a published network.

    Args:
      path: see `weight_files.read`.
      trunk_name: of the trunks that have the file's tensors, the one to take: some
        differ in their input alone. By default the first of `trunks.TRUNKS`.

    Returns:
      the trunk whose weights the file holds, of width 1, and a value for every variable
      of its layers.

    Raises:
      UserError: the file cannot be read, is another network's, or holds values that
        are not float32 or not finite; the hub says that it is another network, or has
        another input; or the package that reads it is missing.
    """
    path = os.fspath(path)
    tensors = weight_files.read(path)
    trunk, naming = _naming_of(path, tensors, trunk_name)
    if path.startswith(hub.PREFIX):
        _require_same(path, trunk, naming, hub.description(path))
    values = _match(path, tensors, naming, _variables(trunk))
    left_out = collections.Counter(naming.left_out(name) for name in tensors)
    del left_out[None]
    listed = ", ".join(f"{what} ({n} tensors)" for what, n in left_out.items())
    _log.info(
        "%s: %s, for images less %s, over %s; left out: %s.",
        *(path, trunk.name, trunk.preprocessing.mean, trunk.preprocessing.scale),
        listed or "nothing",
    )
    return trunk, values


def initialize(model: Embedder, path: str | os.PathLike[str]) -> None:
    """Lets a model start from a file's weights; its new layers stay as they are.

    S and G take theirs, the attention's common part those of the same layers. Logs how
    many parameters come from the file and how many are new.

    Args:
      model: with a trunk of width 1; changed in place.
      path: see `read`.

    Raises:
      UserError: see `read`; or the file holds another trunk, or the model's has
        another width.
    """
    published, weights = read(path, model.trunk)
    if published.name != model.trunk:
        raise UserError(
            f"{path} holds a {published.name!r} and model.trunk is {model.trunk!r}; "
            f"set --config.model.trunk={published.name}."
        )
    values, counts = {}, collections.Counter()
    parameters = flat(nnx.state(model, nnx.Param))
    for key, value in flat(nnx.state(model)).items():
        layer = layer_of(key)
        if layer is not None:
            shape = weights[layer].shape
            if value.shape[value.ndim - len(shape) :] != shape:
                raise UserError(
                    f"{path} has the published sizes, and the model's trunk another "
                    f"width than 1: {'.'.join(layer)} has {value.shape}, not {shape}."
                )
            # A copy: two parameters in one buffer could not be donated to a step.
            values[key] = jnp.array(jnp.broadcast_to(weights[layer], value.shape))
        counts[layer is None] += value.size if key in parameters else 0
    nnx.update(model, nnx.State(traverse_util.unflatten_dict(values)))
    _log.info(
        "%d parameters start from %s, %d are new.", counts[False], path, counts[True]
    )


def flat(state: nnx.State) -> dict[Path, Any]:
    """A state's variables by their paths."""
    return traverse_util.flatten_dict(nnx.to_pure_dict(state))


def _naming_of(
    path: str, tensors: Mapping[str, Tensor], trunk_name: str | None
) -> tuple[Trunk, Naming]:
    def known(choice: tuple[Trunk, Naming]) -> int:
        return sum(choice[1].path(name) is not None for name in tensors)

    choices = [(trunk, naming) for trunk in TRUNKS.values() for naming in trunk.namings]
    most = max(map(known, choices))
    if not most:
        example = f", such as {next(iter(tensors))!r}" if tensors else ""
        networks = " or ".join(dict.fromkeys(n.network for _, n in choices))
        raise UserError(
            f"{path} holds no known network: none of its {len(tensors)} tensors"
            f"{example} is named as in {networks}."
        )
    best = [choice for choice in choices if known(choice) == most]
    if len(best) == 1:
        return best[0]

    def misfits(choice: tuple[Trunk, Naming]) -> tuple[int, bool]:
        """How many tensors do not fit: transformers share the names of theirs."""
        trunk, naming = choice
        wanted = {key: _shape_in_file(v) for key, v in _variables(trunk).items()}
        places = ((naming.path(name), tensor) for name, tensor in tensors.items())
        found = {key: tensor.shape for key, tensor in places if key is not None}
        keys = found.keys() | wanted.keys()
        wrong = sum(found.get(key) != wanted.get(key) for key in keys)
        return wrong, trunk.name != trunk_name

    return min(best, key=misfits)


def _require_same(
    path: str, trunk: Trunk, naming: Naming, told: hub.Description
) -> None:
    """Refuses a file that the hub describes as another network or of another input."""
    if naming.architectures and told.architecture not in (None, *naming.architectures):
        raise UserError(
            f"{path} is timm's {told.architecture!r}, which has the tensors of "
            f"{trunk.name!r} and is another network."
        )

    def has_its_input(trunk: Trunk) -> bool:
        form = trunk.preprocessing
        return all(
            theirs is None or np.allclose(ours, np.multiply(theirs, 255.0), atol=0.1)
            for ours, theirs in ((form.mean, told.mean), (form.scale, told.std))
        )

    if not has_its_input(trunk):
        own = {key: getattr(trunk, key) for key in ("name", "preprocessing", "namings")}
        hint = "".join(
            f"; set --config.model.trunk={name}"
            for name, twin in TRUNKS.items()
            if dataclasses.replace(twin, **own) == trunk and has_its_input(twin)
        )
        raise UserError(
            f"{path} was trained on images less {told.mean}, over {told.std}, which is "
            f"not the input of {trunk.name!r}{hint}."
        )


@functools.cache
def _variables(trunk: Trunk) -> dict[Path, Any]:
    """Shape and dtype of every variable of a trunk's layers."""
    whole = without_values(lambda rngs: trunk.section(trunk.stages, rngs=rngs))
    return flat(nnx.state(whole))


def _shape_in_file(variable: Any) -> tuple[int, ...]:
    axes = _FROM_FILE.get(variable.ndim, range(variable.ndim))
    return tuple(variable.shape[place] for place in np.argsort(axes))


def _match(
    path: str,
    tensors: Mapping[str, Tensor],
    naming: Naming,
    wanted: Mapping[Path, Any],
) -> dict[Path, jax.Array]:
    """The values for every path of `wanted`, or an error with all that is wrong."""
    found: dict[Path, Tensor] = {}
    wrong = collections.defaultdict(list)
    for name, tensor in tensors.items():
        key = naming.path(name)
        if naming.left_out(name):
            continue
        if key is None or key not in wanted:
            wrong["unknown"].append(name)
            continue
        found[key] = tensor
        shape = _shape_in_file(wanted[key])
        if tensor.shape != shape:
            hint = naming.hint(name)
            why = f" ({hint})" if hint else ""
            wrong["wrong shape"].append(f"{name} {tensor.shape}, not {shape}{why}")
        if tensor.dtype != "float32":
            wrong["not float32"].append(f"{name} {tensor.dtype}")
    wrong["missing"] = [".".join(key) for key in wanted if key not in found]
    _raise_if(path, naming, wrong)
    values = {}
    for key, tensor in found.items():
        value = tensor.read()
        if not np.isfinite(value).all() or (key[-1] == "var" and (value < 0).any()):
            wrong["not finite, or a negative variance"].append(".".join(key))
        axes = _FROM_FILE.get(value.ndim, range(value.ndim))
        values[key] = jnp.asarray(value.transpose(axes))
    _raise_if(path, naming, wrong)
    return values


def _raise_if(path: str, naming: Naming, wrong: Mapping[str, list[str]]) -> None:
    problems = [
        f"{what} ({len(names)}): {', '.join(names[:_NAMED])}"
        f"{', ...' if len(names) > _NAMED else ''}"
        for what, names in wrong.items()
        if names
    ]
    if problems:
        raise UserError(
            f"{path} is not the float32 weights of {naming.network}: "
            f"{'; '.join(problems)}."
        )
