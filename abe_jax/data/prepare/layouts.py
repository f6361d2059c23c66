"""What is in a source: which layout of a data set, in a folder or packed."""

import logging
import os
import pathlib
from collections.abc import Mapping

from abe_jax.data.datasets.definition import DataSet
from abe_jax.data.datasets.listing import Expected, Listing
from abe_jax.data.datasets.tree import Tree
from abe_jax.data.prepare import archives
from abe_jax.errors import UserError

_log = logging.getLogger(__name__)

_ROUNDS = 3  # of unpacking what is in an archive: one can hold itself


def read(
    dataset: DataSet,
    source: pathlib.Path,
    scratch: pathlib.Path,
    expected: Expected | None = None,
) -> Listing:
    """Finds out what a source holds, and lists its images.

    Args:
      dataset: one that has something to read.
      source: a folder, or an archive (zip, tgz, tar). Where a data set has official
        numbers and the files alone are not all of it, archives among them are unpacked,
        and those inside; so are parquet files, where the data set has such mirrors.
      scratch: folder for what is unpacked; the images of the listing may lie in it.
      expected: numbers to hold the data to; the official ones by default.

    Raises:
      UserError: nothing there, no known layout, or not the official data; the message
        begins with what was wrong before archives in the source were unpacked.
    """
    expected = dataset.expected if expected is None else expected
    folders = [source]
    if source.is_file():
        if not archives.is_archive(source.name):
            raise UserError(
                f"--source {str(source)!r} is neither a folder nor a zip, tgz or tar "
                "file; of parquet files give the folder."
            )
        folders = [scratch / "source"]
        archives.unpack(source, folders[0], skip_encrypted=False)
    unpacked: set[str] = set()
    errors: list[UserError] = []
    try:
        while True:
            tree = Tree.of(*folders)
            tree.root = str(source)  # not a folder that will be gone
            try:
                return _read_tree(dataset, tree, expected)
            except UserError as error:
                errors.append(error)
            packed = _packed(dataset, tree, unpacked)
            if not packed or len(errors) > _ROUNDS:
                break
            folders.append(scratch / str(len(errors)))
            _unpack(packed, folders[-1])
            unpacked |= packed.keys()
    except UserError as error:
        errors.append(error)
    first, last = str(errors[0]), str(errors[-1])
    if last != first:
        first += f" Its archives were tried, too: {last}"
    raise UserError(first) from errors[-1]


def _read_tree(dataset: DataSet, tree: Tree, expected: Expected) -> Listing:
    assert dataset.read is not None
    listing = dataset.read(tree, expected)
    _log.info("%s: found the layout '%s'", dataset.name, listing.layout)
    return listing


def _parents(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _packed(dataset: DataSet, tree: Tree, unpacked: set[str]) -> dict[str, str]:
    """Relative path -> path of what may be unpacked and is not."""
    folders = {p for name in tree.files for p in _parents(name)}
    return {
        name: path
        for name, path in tree.files.items()
        if dataset.expected and name not in unpacked
        if (archives.is_archive(name) and not archives.unpacked_already(name, folders))
        or (dataset.parquet and archives.is_parquet(name))
    }


def _unpack(packed: Mapping[str, str], folder: pathlib.Path) -> None:
    """Unpacks each file to where it would be if unpacked beside itself."""
    parquet = [pathlib.Path(p) for n, p in packed.items() if archives.is_parquet(n)]
    if parquet:
        archives.unpack_parquet(parquet, folder / "parquet")
    for name, path in packed.items():
        if archives.is_archive(name):
            place = folder / os.path.dirname(name)
            archives.unpack(pathlib.Path(path), place, skip_encrypted=True)
