"""Embeddings of a folder of images, as a file."""

import os
import pathlib
import shutil
import tempfile
import zipfile
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from abe_jax.apply import progress
from abe_jax.apply.images import ImageFile, Path, find, shown
from abe_jax.apply.output import require_a_place
from abe_jax.apply.trained import Trained
from abe_jax.data.datasets.tree import locate
from abe_jax.errors import UserError
from abe_jax.workdir import claim, whole


def embed_images(
    config, workdir: str, *, images: str, output: str, strict: bool, step: int | None
) -> None:
    """Embeds all images of a folder, and says which could not be read.

    `--mode=embed`.

    Args:
      config: of the run.
      workdir: folder of the run.
      images: folder, zip file or image.
      output: file to write, by its suffix: .npz or .parquet.
      strict: whether an image that cannot be read ends it, and nothing is written.
      step: of the checkpoint; the newest by default.

    Raises:
      UserError: the config is not that of the run; or as of `write_embeddings`.
    """
    _require_known(locate(output, "output"))
    claim.require_run(workdir, config)
    model = Trained(workdir, step, config=config)
    refused = write_embeddings(model, images, output, strict=strict)
    progress.list_refused(error for _, error in refused)
    print(output)


def write_embeddings(
    model: Trained, images: Path, output: Path, *, strict: bool = False
) -> list[tuple[ImageFile, UserError]]:
    """Writes the embeddings of all images of a folder, in the order of their names.

    The memory that it takes does not grow with their number.

    Args:
      model: as of `abe_jax.load`.
      images: folder, zip file or image.
      output: `.npz`: `embeddings` float32 `[N, D]` (`[N, M, D/M]` flattened), `paths`
        `[N]` text, `num_learners`. `.parquet`: columns `path` (text; a byte of a name
        that is no UTF-8 as `\\xff`), `path_bytes`, and `embedding`, a list of D.
      strict: whether an image that cannot be read is an error.

    Returns:
      images that could not be read and were left out, and why.

    Raises:
      UserError: no images, another suffix, the output cannot be written, or, if
        strict, an image cannot be read.
    """
    path = locate(output, "output")
    writer = _require_known(path)
    files = find(images)
    refused: list[tuple[ImageFile, UserError]] = []

    def refuse(file: ImageFile, error: UserError) -> None:
        if strict:
            raise error
        refused.append((file, error))

    try:
        with whole(path) as part:
            with writer(part, model) as rows:
                shown_files = progress.shown(files)
                for done, embeddings in model.embed_files(shown_files, refuse):
                    flat = embeddings.reshape(len(embeddings), -1)
                    rows.add([file.name for file in done], flat)
            if len(refused) == len(files):
                raise UserError(f"no image could be read; the first: {refused[0][1]}")
    except OSError as error:
        raise UserError(f"cannot write to --output: {error}.") from error
    return refused


class _Writer(Protocol):
    """Takes rows as they come; leaving its context ends the file."""

    def __init__(self, path: pathlib.Path, model: Trained): ...

    def __enter__(self) -> "_Writer": ...

    def __exit__(self, *exc: object) -> None: ...

    def add(self, names: list[str], rows: np.ndarray) -> None:
        """Takes names and their embeddings `[n, D]`."""
        ...


class _Npz:
    def __init__(self, path: pathlib.Path, model: Trained):
        self._path = path
        self._model = model
        self._names: list[str] = []
        # The number of rows stands before them in the file, and is not known yet.
        self._rows: BinaryIO = tempfile.TemporaryFile(dir=path.parent)

    def __enter__(self) -> "_Npz":
        return self

    def add(self, names: list[str], rows: np.ndarray) -> None:
        self._names += names
        self._rows.write(np.ascontiguousarray(rows, "<f4").tobytes())

    def __exit__(self, failed: object, *_) -> None:
        with self._rows as rows:
            if failed:
                return
            shape = (len(self._names), self._model.dim)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            rows.seek(0)
            with zipfile.ZipFile(self._path, "w", allowZip64=True) as archive:
                with archive.open("embeddings.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_2_0(member, header)
                    shutil.copyfileobj(rows, member, 2**20)
                others = {
                    "paths": np.array(self._names),
                    "num_learners": np.array(self._model.num_learners),
                }
                for name, array in others.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)


class _Parquet:
    def __init__(self, path: pathlib.Path, model: Trained):
        self._schema = pa.schema(
            {
                "path": pa.string(),
                "path_bytes": pa.binary(),
                "embedding": pa.list_(pa.float32(), model.dim),
            },
            metadata={"num_learners": str(model.num_learners)},
        )
        self._writer = parquet.ParquetWriter(path, self._schema)

    def __enter__(self) -> "_Parquet":
        return self

    def add(self, names: list[str], rows: np.ndarray) -> None:
        flat = pa.array(np.ascontiguousarray(rows, np.float32).ravel())
        columns = [
            pa.array([shown(name) for name in names]),
            pa.array([os.fsencode(name) for name in names]),
            pa.FixedSizeListArray.from_arrays(flat, rows.shape[1]),
        ]
        self._writer.write_table(pa.table(columns, schema=self._schema))

    def __exit__(self, *_) -> None:
        self._writer.close()


_WRITERS: dict[str, type[_Writer]] = {".npz": _Npz, ".parquet": _Parquet}


def _require_known(path: pathlib.Path) -> type[_Writer]:
    if path.suffix not in _WRITERS:
        known = " or ".join(_WRITERS)
        raise UserError(f"--output={shown(path)} must end in {known}.")
    require_a_place(path)
    return _WRITERS[path.suffix]
