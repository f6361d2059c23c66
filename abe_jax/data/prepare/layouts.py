"""What is in a source: which layout of a data set, in a folder or packed."""

import logging
import pathlib

from abe_jax.data.datasets.definition import DataSet
from abe_jax.data.datasets.listing import Expected, Listing
from abe_jax.data.datasets.tree import Tree
from abe_jax.data.prepare import archives
from abe_jax.errors import UserError

_log = logging.getLogger(__name__)


def read(
    dataset: DataSet,
    source: pathlib.Path,
    scratch: pathlib.Path,
    expected: Expected | None = None,
) -> Listing:
    """Finds out what a source holds, and lists its images.

    Args:
      dataset: one that has something to read.
      source: a folder, or an archive (zip, tgz, tar). Archives and parquet files in a
        folder are unpacked where it does not make a data set without them.
      scratch: folder for what is unpacked; the images of the listing may lie in it.
      expected: numbers to hold the data to; the official ones by default.

    Raises:
      UserError: nothing there, no known layout, or not the official data.
    """
    expected = dataset.expected if expected is None else expected
    if source.is_file():
        if not archives.is_packed(source.name):
            raise UserError(
                f"--source {str(source)!r} is neither a folder nor a zip, tgz, tar or "
                "parquet file."
            )
        tree = _unpacked([source], source.parent, scratch)
        return _read_tree(dataset, tree, expected)
    tree = Tree.of(source)
    try:
        return _read_tree(dataset, tree, expected)
    except UserError:
        folders = {p for name in tree.files for p in _parents(name)}
        packed = [
            pathlib.Path(path)
            for name, path in tree.files.items()
            if archives.is_packed(name) and not archives.unpacked_already(name, folders)
        ]
        if not packed or not dataset.expected:
            raise
    tree = _unpacked(packed, source, scratch, source)
    return _read_tree(dataset, tree, expected)


def _read_tree(dataset: DataSet, tree: Tree, expected: Expected) -> Listing:
    assert dataset.read is not None
    listing = dataset.read(tree, expected)
    _log.info("%s: found the layout '%s'", dataset.name, listing.layout)
    return listing


def _parents(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _unpacked(
    packed: list[pathlib.Path],
    base: pathlib.Path,
    scratch: pathlib.Path,
    *others: pathlib.Path,
) -> Tree:
    """The files of archives, each where it would lie if unpacked beside itself."""
    parquet = [path for path in packed if path.name.lower().endswith(".parquet")]
    if parquet:
        archives.unpack_parquet(parquet, scratch / "parquet")
    for path in packed:
        if path not in parquet:
            below = path.parent.relative_to(base)
            archives.unpack(path, scratch / below, skip_encrypted=bool(others))
    return Tree.of(*others, scratch)
