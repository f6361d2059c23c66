"""Images of a folder or zip file, one folder a class.

    photos/ash/1.jpg  photos/ash/2.png  photos/oak/1.webp ...          classes only
    photos/train/ash/1.jpg ...  photos/test/oak/1.jpg ...              explicit split

Without parts the first half of the sorted classes trains; folders that are numbered
are sorted by their numbers. Hidden files, the `._*` copies that macOS writes, system
folders of network drives, and workdirs of runs are left out.
"""

import hashlib
import os

import numpy as np

from abe_jax.data.datasets import copies
from abe_jax.data.datasets.class_folders import arrange
from abe_jax.data.datasets.definition import DataSet
from abe_jax.data.datasets.listing import Expected, Listing, Record
from abe_jax.data.datasets.tree import Tree, Zip, local
from abe_jax.data.decoding import MAX_BYTES, decode, reason, require_known_square
from abe_jax.data.prepared import ROLES
from abe_jax.errors import UserError


class ImageFolder:
    """Random access to the images of a folder or zip file, as RGB squares.

    Picklable and safe to read from many threads: files are opened when read.

    Attributes:
      prefix: outer folders that only wrap the classes, or "".
      names: path of each image below them, with forward slashes.
      labels: int32 `[N]`, index into `class_names`.
      class_names: names of the class folders, in order.
      roles: `[N]`, "train" or "test".
    """

    storage = "image files as they are"

    def __init__(
        self, path: str | os.PathLike[str], size: int, *, square: str = "centre"
    ):
        """Lists the images; reads none.

        Args:
          path: folder, or zip file, with one folder a class.
          size: side of the squares that indexing returns, pixels.
          square: "centre", "squeeze" or "pad"; see `decoding.decode`.

        Raises:
          UserError: nothing there, the folder is not arranged by classes, or `square`
            is unknown.
        """
        self.path = local(path, "data.path")
        self.size = size
        self._square = require_known_square(square)
        if not os.path.exists(self.path):
            raise UserError(
                f"data.path {str(path)!r} does not exist; give a folder or a zip file "
                "with one folder a class."
            )
        tree = Tree.of_zip(self.path) if self.path.is_file() else Tree.of(self.path)
        found = arrange(tree)
        self.prefix, self.names, self.roles = found.prefix, found.names, found.roles
        self.labels, self.class_names = found.labels, found.class_names
        self._zip: Zip | None = None

    @property
    def stamp(self) -> str:
        """A hash of each file's size and modification time, or of the zip file's."""
        names = [self.prefix + name for name in self.names]
        one = self.path.is_file()
        files = [self.path] if one else [self.path / name for name in names]
        digest = hashlib.sha256()
        for file in files:
            try:
                status = file.stat()
            except OSError:  # a link to nothing, say: reading it will tell
                digest.update(b"unreadable\n")
                continue
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        """The image as uint8 `[size, size, 3]` RGB.

        Raises:
          UserError: the file cannot be read as an image.
        """
        name = f"{self.path}/{self.prefix}{self.names[index]}"
        try:
            return decode(self._read(index), self.size, name, square=self._square)
        except UserError as error:  # a run knows its data by the names
            raise UserError(
                f"{error} Put a sound image of that name in its place to go on; "
                "abe_jax.prepare finds all such files before a run (--skip_bad)."
            ) from error

    def count_copies(self, some: np.ndarray, others: np.ndarray) -> int:
        """How many of `others` are copies of an image of `some`.

        Args:
          some: integer indices.
          others: integer indices.
        """
        names = [self.prefix + name for name in self.names]
        if not self.path.is_file():
            paths = [os.path.join(self.path, name) for name in names]
            return copies.count_copies(
                [paths[i] for i in some], [paths[i] for i in others]
            )
        with Zip(self.path) as archive:
            members = archive.members
        keys = [(members[name].file_size, members[name].CRC) for name in names]
        known = {keys[i] for i in some}
        return sum(keys[i] in known for i in others)

    def _read(self, index: int) -> bytes:
        name = self.prefix + self.names[index]
        try:
            if not self.path.is_file():
                return (self.path / name).read_bytes()
            if self._zip is None:
                self._zip = Zip(self.path)
            member = self._zip.members[name]
            if member.file_size <= MAX_BYTES:
                return self._zip.read(member)
        # Damage in a zip file shows in many ways, those of the decompressors too.
        except Exception as error:
            raise UserError(
                f"cannot read {name} in {self.path}: {reason(error)}."
            ) from error
        raise UserError(f"{name} in {self.path} is larger than {MAX_BYTES} bytes.")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None}  # an open file cannot be pickled


def _read(tree: Tree, expected: Expected) -> Listing:
    """Lists the images as they are split when read directly."""
    del expected  # there are no official numbers
    found = arrange(tree)
    images = zip(found.names, found.labels.tolist(), found.roles, strict=True)
    ordered = sorted(images, key=lambda i: (ROLES.index(i[2]), i[1], i[0]))
    records = [
        Record(tree.files[found.prefix + name], name, found.class_names[label], role)
        for name, label, role in ordered
    ]
    parts = " in train/ and test/" if found.has_parts else ""
    names = {name: name for name in found.class_names}
    return Listing(f"class folders{parts}", records, names)


def _open(config) -> ImageFolder:
    if not config.path:
        raise UserError(
            "data.path is not set; give a folder or a zip file with one folder a "
            "class: --config.data.path=DIR"
        )
    return ImageFolder(config.path, config.load_size, square=config.square)


DATASET = DataSet(
    name="image_folder", licence="that of the images", read=_read, open=_open
)
