"""Tensors from files that nobody vouches for: ONNX, safetensors and torch.

No code of a file is run: torch reads with `weights_only=True`, never by plain pickle. A
file that points to other files, is packed, or is too large is refused. The packages
that read are optional: each is imported where it is needed.
"""

import dataclasses
import importlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from abe_jax.errors import UserError, first_line
from abe_jax.models import hub

# Twice a ViT-B with a classifier of 21,843 classes, in float32.
_MAX_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, before its values are read.

    Attributes:
      dtype: NumPy's name of it, or the file's where NumPy has none.
      shape: as the file has it.
      read: gives the values.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file by their names; the file type is that of the file's name.

    Args:
      path: file that ends in `.onnx` (its initialisers), `.safetensors`, `.pth` or
        `.pt` (a state dict), `~` being the home folder; or such a file on the hub; see
        `hub.fetch`.

    Raises:
      UserError: the file is not there, too large, broken or not plain weights; or the
        package that reads it is not installed.
    """
    text = os.fspath(path)
    on_hub = text.startswith(hub.PREFIX)
    file = hub.fetch(text) if on_hub else Path(os.path.expanduser(text))
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}: pretrained weights are read from {', '.join(_READERS)} files."
        )
    try:
        size = file.stat().st_size if file.is_file() else None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if size is None:
        raise UserError(f"{path}: there is no such file.")
    if size > _MAX_BYTES:
        raise UserError(
            f"{path} has {size} bytes; no trunk has more than {_MAX_BYTES}."
        )
    try:
        return reader(file)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: reading it needs a package that is not installed: "
            f"pip install {error.name}"
        ) from error
    except UserError:
        raise
    # The three readers raise a dozen types at a file that is broken or is not theirs.
    except Exception as error:
        raise UserError(
            f"{path} is broken, or is no {file.suffix} file of plain weights: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _read_onnx(file: Path) -> dict[str, Tensor]:
    onnx: Any = importlib.import_module("onnx")

    # External data would name other files to read; published files have none.
    graph = onnx.load_model(file, load_external_data=False).graph
    tensors = {}
    for tensor in graph.initializer:
        dtype = str(onnx.TensorProto.DataType.Name(tensor.data_type)).lower()
        dtype = "float32" if dtype == "float" else dtype
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise UserError(f"{file}: {tensor.name} is in another file; save as one.")

        def read(tensor=tensor) -> np.ndarray:
            try:
                return onnx.numpy_helper.to_array(tensor)
            except ValueError as error:
                raise UserError(f"{file} is broken: {tensor.name}: {error}") from error

        tensors[tensor.name] = Tensor(dtype, tuple(tensor.dims), read)
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    safetensors: Any = importlib.import_module("safetensors")

    tensors = {}
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    handle = safetensors.safe_open(file, framework="numpy")
    for name in handle.keys():
        entry = handle.get_slice(name)
        dtype = str(entry.get_dtype())

        def read(name=name) -> np.ndarray:
            return handle.get_tensor(name)

        tensors[name] = Tensor(names.get(dtype, dtype), tuple(entry.get_shape()), read)
    return tensors


def _read_torch(file: Path) -> dict[str, Tensor]:
    torch: Any = importlib.import_module("torch")

    with file.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"
    if is_zip:
        # torch stores its records plainly; packed or overlapping ones are a zip bomb.
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
        packed = any(r.compress_type != zipfile.ZIP_STORED for r in records)
        if packed or sum(r.file_size for r in records) > file.stat().st_size:
            raise UserError(
                f"{file} is a packed zip file, which torch.save never writes; it may "
                "be a zip bomb and was not unpacked."
            )
    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()
    ):
        raise UserError(
            f"{file} holds no state dict (names and tensors) but a "
            f"{type(content).__name__}; save with torch.save(model.state_dict(), ...)."
        )
    for name, value in content.items():
        if value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(
                f"{file}: {name} is no plain tensor: {value.layout}, on {value.device}."
            )
    return {
        name: Tensor(
            str(value.dtype).removeprefix("torch."),
            tuple(value.shape),
            lambda value=value: value.detach().numpy(),
        )
        for name, value in content.items()
    }


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".onnx": _read_onnx,
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
}
