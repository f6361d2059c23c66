"""Published GoogLeNet weights, read from the files in which people have them.

    .onnx          the ONNX model zoo's BVLC GoogLeNet            needs `onnx`
    .safetensors   torchvision's `googlenet`, as a state dict     needs `safetensors`
    .pth, .pt      the same, as `torch.save` writes it            needs `torch`

Tables below tell where each tensor of a file goes. A file is taken whole or not at all:
a missing, unknown or wrongly shaped tensor is an error, as is any dtype but float32
(half precision has lost digits that training starts from) and any value that is not
finite. Classifiers are left out. No code of a file is run (see `weight_files`).
"""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx, traverse_util

from abe_jax.errors import UserError
from abe_jax.models import is_new_layer, weight_files
from abe_jax.models.googlenet import GoogLeNet
from abe_jax.models.weight_files import Tensor

Path = tuple[str, ...]

# A convolution's kernel: [out, in, h, w] in every file, [h, w, in, out] in Flax.
_FROM_OIHW = (2, 3, 1, 0)


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a published GoogLeNet names its tensors.

    Attributes:
      variant: key of `googlenet.VARIANTS`.
      rows: pattern of names, and the path in `GoogLeNet` that it stands for, with the
        pattern's groups in braces.
      words: for each group, the texts it may have and what they stand for.
      skipped: patterns of the tensors that are left out, and what these are.
    """

    variant: str
    rows: tuple[tuple[str, str], ...]
    words: Mapping[str, Mapping[str, str]]
    skipped: Mapping[str, str]

    def path(self, name: str) -> Path | None:
        """Where a tensor goes; None for a name that is not in the table."""
        for pattern, target in self.rows:
            if match := re.fullmatch(pattern, name):
                groups = match.groupdict().items()
                words = {k: self.words[k].get(text, "") for k, text in groups}
                return (
                    tuple(target.format(**words).split("."))
                    if all(words.values())
                    else None
                )
        return None

    def left_out(self, name: str) -> str | None:
        """What a tensor is that is left out on purpose; None for all others."""
        for pattern, what in self.skipped.items():
            if re.fullmatch(pattern, name):
                return what
        return None


BVLC = Naming(
    variant="googlenet",
    rows=(
        (r"conv1/7x7_s2_(?P<leaf>[wb])_0", "spatial.conv1.conv.{leaf}"),
        (r"conv2/3x3_reduce_(?P<leaf>[wb])_0", "spatial.conv2_reduce.conv.{leaf}"),
        (r"conv2/3x3_(?P<leaf>[wb])_0", "spatial.conv2.conv.{leaf}"),
        (
            r"inception_(?P<block>[345][a-e])/(?P<branch>\w+)_(?P<leaf>[wb])_0",
            "{block}.{branch}.conv.{leaf}",
        ),
    ),
    words={
        "block": {
            "3a": "spatial.inception_3a",
            "3b": "spatial.inception_3b",
            **{f"4{c}": f"global_features.inception_4.{c}" for c in "abcde"},
            "5a": "global_features.inception_5a",
            "5b": "global_features.inception_5b",
        },
        "branch": {
            "1x1": "one",
            "3x3_reduce": "three_reduce",
            "3x3": "three",
            "5x5_reduce": "five_reduce",
            "5x5": "five",
            "pool_proj": "pool",
        },
        "leaf": {"w": "kernel", "b": "bias"},
    },
    skipped={
        r"loss3/.*": "1000-way classifier",
        r"loss[12]/.*": "auxiliary classifiers",
        r"OC2_DUMMY_\d+": "shapes of the classifier's reshapes",
    },
)

TORCHVISION = Naming(
    variant="googlenet_bn",
    rows=(
        (r"(?P<stem>conv[123])\.(?P<leaf>.+)", "spatial.{stem}.{leaf}"),
        (
            r"inception(?P<block>[345][a-e])\.branch(?P<branch>[\d.]+)\.(?P<leaf>.+)",
            "{block}.{branch}.{leaf}",
        ),
    ),
    words={
        "stem": {"conv1": "conv1", "conv2": "conv2_reduce", "conv3": "conv2"},
        "block": BVLC.words["block"],
        "branch": {
            "1": "one",
            "2.0": "three_reduce",
            "2.1": "three",
            "3.0": "five_reduce",
            "3.1": "five",
            "4.1": "pool",
        },
        "leaf": {
            "conv.weight": "conv.kernel",
            "bn.weight": "norm.scale",
            "bn.bias": "norm.bias",
            "bn.running_mean": "norm.mean",
            "bn.running_var": "norm.var",
        },
    },
    skipped={
        r"fc\..*": "1000-way classifier",
        r"aux[12]\..*": "auxiliary classifiers",
        r".*\.num_batches_tracked": "counters of batch norm",
    },
)

_NAMINGS = (BVLC, TORCHVISION)

# Where each part of a model comes from: prefix of its path, prefix in `GoogLeNet`. The
# heads of M-heads all start from the same G.
_SOURCES: dict[Path, Path] = {
    ("trunk",): (),
    ("attention_branch", "common"): ("global_features", "inception_4"),
    ("spatial",): ("spatial",),
    ("heads", "global_features"): ("global_features",),
}


def load_googlenet(path: str) -> GoogLeNet:
    """Reads a GoogLeNet from a file; its variant is that of the file.

    Args:
      path: file that ends in `.onnx`, `.safetensors`, `.pth` or `.pt`.

    Returns:
      a trunk of width 1 with the file's weights.

    Raises:
      UserError: the file cannot be read, is another network's, or holds values that
        are not float32 or not finite; or the package that reads it is missing.
    """
    tensors = weight_files.read(path)
    naming = _naming_of(path, tensors)
    model = nnx.eval_shape(lambda: GoogLeNet(naming.variant, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    values = _match(path, tensors, naming, _flat(state))
    left_out = collections.Counter(naming.left_out(name) for name in tensors)
    del left_out[None]
    listed = ", ".join(f"{what} ({n} tensors)" for what, n in left_out.items())
    logging.info("%s: %s; left out: %s.", path, naming.variant, listed or "nothing")
    return nnx.merge(graphdef, nnx.State(traverse_util.unflatten_dict(values)))


def initialize(model: nnx.Module, path: str, *, trunk: str) -> None:
    """Lets a model start from a file's weights; its new layers stay as they are.

    S and G take theirs, the attention's common part those of the same 4a to 4e. Logs
    how many parameters come from the file and how many are new.

    Args:
      model: one that `models.create` makes, of width 1; changed in place.
      path: see `load_googlenet`.
      trunk: the model's variant, a key of `googlenet.VARIANTS`.

    Raises:
      UserError: see `load_googlenet`; or the file holds another variant.
    """
    googlenet = load_googlenet(path)
    if googlenet.variant != trunk:
        raise UserError(
            f"{path} holds a {googlenet.variant!r} and model.trunk is {trunk!r}; set "
            f"--config.model.trunk={googlenet.variant}."
        )
    weights = _flat(nnx.state(googlenet))
    values, counts = {}, collections.Counter()
    parameters = _flat(nnx.state(model, nnx.Param))
    for key, value in _flat(nnx.state(model)).items():
        new = is_new_layer(key)
        if not new:
            # A copy: two parameters in one buffer could not be donated to a step.
            source = weights[source_of(key)]
            values[key] = jnp.array(jnp.broadcast_to(source, value.shape))
        counts[new] += value.size if key in parameters else 0
    nnx.update(model, nnx.State(traverse_util.unflatten_dict(values)))
    logging.info(
        "%d parameters start from %s, %d are new.", counts[False], path, counts[True]
    )


def _flat(state: nnx.State) -> dict[Path, Any]:
    return traverse_util.flatten_dict(nnx.to_pure_dict(state))


def source_of(path: Path) -> Path:
    """Where in `GoogLeNet` a model's variable starts from.

    Args:
      path: keys of a variable in the pure dict of a model's state; no new layer's.
    """
    for prefix, origin in _SOURCES.items():
        if path[: len(prefix)] == prefix:
            return (*origin, *path[len(prefix) :])
    raise KeyError(path)


def _naming_of(path: str, tensors: Mapping[str, Tensor]) -> Naming:
    def known(naming: Naming) -> int:
        return sum(naming.path(name) is not None for name in tensors)

    naming = max(_NAMINGS, key=known)
    if not known(naming):
        example = f", such as {next(iter(tensors))!r}" if tensors else ""
        raise UserError(
            f"{path} holds no GoogLeNet: none of its {len(tensors)} tensors{example} "
            "is named as in the ONNX zoo's BVLC GoogLeNet or torchvision's googlenet."
        )
    return naming


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
        shape = wanted[key].shape
        if len(shape) == 4:
            shape = tuple(shape[_FROM_OIHW.index(axis)] for axis in range(4))
        if tensor.shape != shape:
            wrong["wrong shape"].append(f"{name} {tensor.shape}, not {shape}")
        if tensor.dtype != "float32":
            wrong["not float32"].append(f"{name} {tensor.dtype}")
    wrong["missing"] = [".".join(key) for key in wanted if key not in found]
    _raise_if(path, naming, wrong)
    values = {}
    for key, tensor in found.items():
        value = tensor.read()
        if not np.isfinite(value).all() or (key[-1] == "var" and (value < 0).any()):
            wrong["not finite, or a negative variance"].append(".".join(key))
        if value.ndim == 4:
            value = value.transpose(_FROM_OIHW)
        values[key] = jnp.asarray(value)
    _raise_if(path, naming, wrong)
    return values


def _raise_if(path: str, naming: Naming, wrong: Mapping[str, list[str]]) -> None:
    problems = [
        f"{what} ({len(names)}): {', '.join(names)}"
        for what, names in wrong.items()
        if names
    ]
    if problems:
        raise UserError(
            f"{path} is not the float32 weights of a {naming.variant!r}: "
            f"{'; '.join(problems)}."
        )
