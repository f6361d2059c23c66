"""Embeddings of a folder of images, as a file."""

import os
import pathlib
import tempfile
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from abe_jax import interrupts
from abe_jax.apply import npz, progress
from abe_jax.apply.images import ImageFile, Path, find
from abe_jax.apply.output import by_suffix, written
from abe_jax.apply.trained import Trained
from abe_jax.data.datasets.tree import local, printable
from abe_jax.errors import UserError
from abe_jax.workdir import claim


@interrupts.ended_by_others_too()
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
      UserError: the config is not that of the run; or see `write_embeddings`.
    """
    by_suffix(local(output, "output"), _WRITERS)
    claim.require_run(workdir, config)
    model = Trained(workdir, step, config=config)
    refused = write_embeddings(model, images, output, strict=strict)
    progress.list_refused(error for _, error in refused)
    print(printable(output))


def write_embeddings(
    model: Trained, images: Path, output: Path, *, strict: bool = False
) -> list[tuple[ImageFile, UserError]]:
    """Writes the embeddings of all images of a folder, in the order of their names.

    Of all images only the names are held at once.

    Args:
      model: as returned by `abe_jax.load`.
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
    path = local(output, "output")
    writer = by_suffix(path, _WRITERS)
    files = find(images)
    refused: list[tuple[ImageFile, UserError]] = []

    def refuse(file: ImageFile, error: UserError) -> None:
        if strict:
            raise error
        refused.append((file, error))

    with written(path) as part:
        with writer(part, model) as rows:
            for done, embeddings in model.embed_files(progress.bar(files), refuse):
                flat = embeddings.reshape(len(embeddings), -1)
                rows.add([file.name for file in done], flat)
        if len(refused) == len(files):
            raise UserError(f"no image could be read; the first: {refused[0][1]}")
    return refused


_ROW_GROUP = 16_384  # rows of a Parquet file that are compressed together


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
            others = {
                "paths": np.array(self._names),
                "num_learners": np.array(self._model.num_learners),
            }
            rows.seek(0)
            blocks = iter(lambda: rows.read(2**20), b"")
            npz.write(self._path, shape, blocks, others)


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
        # Opened here: pyarrow takes no name that is not UTF-8.
        self._file = path.open("wb")
        self._writer = parquet.ParquetWriter(self._file, self._schema)
        self._names: list[str] = []
        self._rows: list[np.ndarray] = []

    def __enter__(self) -> "_Parquet":
        return self

    def add(self, names: list[str], rows: np.ndarray) -> None:
        self._names += names
        self._rows.append(rows)
        if len(self._names) >= _ROW_GROUP:
            self._write()

    def _write(self) -> None:
        rows = np.ascontiguousarray(np.concatenate(self._rows), np.float32)
        encoded = [os.fsencode(name) for name in self._names]
        columns = [
            pa.array([x.decode("utf-8", "backslashreplace") for x in encoded]),
            pa.array(encoded),
            pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1]),
        ]
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self._names, self._rows = [], []

    def __exit__(self, failed: object, *_) -> None:
        with self._file, self._writer:
            if self._names and not failed:
                self._write()


_WRITERS: dict[str, type[_Writer]] = {".npz": _Npz, ".parquet": _Parquet}
