"""Images of a folder or zip file, one folder a class.

    photos/ash/1.jpg  photos/ash/2.png  photos/oak/1.webp ...          classes only
    photos/train/ash/1.jpg ...  photos/test/oak/1.jpg ...              explicit split

Hidden files and the `._*` copies that macOS writes are ignored.
"""

import os
import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np

from abe_jax.data.datasets.definition import DataSet
from abe_jax.data.datasets.listing import Expected, Listing, Record, Tree
from abe_jax.data.decoding import decode, require_known_square
from abe_jax.data.prepared import ROLES
from abe_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Above this a member of a zip file is no photograph but a trap.
_MAX_BYTES = 512 * 2**20


class ImageFolder:
    """Random access to the images of a folder or zip file, as RGB squares.

    Picklable and safe to read from many threads: files are opened when read.

    Attributes:
      prefix: outer folders that only wrap the classes, or "".
      names: path of each image below them, with forward slashes.
      labels: int32 `[N]`, index into `class_names`.
      class_names: sorted names of the class folders.
      roles: `[N]`, "train" or "test" where the folder has such parts, else empty.
    """

    storage = "image files as they are"

    def __init__(
        self, path: str | os.PathLike[str], size: int, *, square: str = "centre"
    ):
        """Lists the images; reads none.

        Args:
          path: folder, or zip file, with one folder a class.
          size: side of the squares that indexing returns, pixels.
          square: "centre", "squeeze" or "pad", as of `decoding.decode`.

        Raises:
          UserError: nothing there, no classes, an empty class, fewer than two classes,
            or `square` is unknown.
        """
        self.path = pathlib.Path(path)
        self.size = size
        self._square = require_known_square(square)
        if not self.path.exists():
            raise UserError(
                f"data.path {str(path)!r} does not exist; give a folder or a zip file "
                "with one folder a class."
            )
        is_zip = self.path.is_file()
        members = _zip_members(self.path) if is_zip else _folder_members(self.path)
        self.prefix, parts, folders = _strip_prefix(*members)
        self.roles: tuple[str, ...] = ()
        if folders and {p[0] for p in folders} == {"train", "test"}:
            _refuse_mixed(parts)
            self.roles = tuple(p[0] for p in parts)
        depth = 2 if self.roles else 1
        _refuse_loose(parts, depth, self.path)
        self.names = tuple("/".join(p) for p in parts)
        classes = [p[depth - 1] for p in parts]
        class_names, labels = np.unique(classes, return_inverse=True)
        self.class_names = tuple(map(str, class_names))
        self.labels = labels.astype(np.int32)
        empty = {p[:depth] for p in folders if len(p) >= depth}
        empty -= {p[:depth] for p in parts}
        if empty:
            first = "/".join(min(empty))
            raise UserError(
                f"{len(empty)} class folder(s) of {self.path} hold no image, the first "
                f"is {first!r}; images end in {', '.join(SUFFIXES)}. Remove the folder "
                "or fill it."
            )
        if len(self.class_names) < 2:
            raise UserError(
                f"{self.path} holds {len(self.class_names)} class(es); at least 2 are "
                "needed, one folder each."
            )
        self._zip: zipfile.ZipFile | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        """The image as uint8 `[size, size, 3]` RGB.

        Raises:
          UserError: the file cannot be read as an image.
        """
        name = f"{self.path}/{self.names[index]}"
        return decode(self._read(index), self.size, name, square=self._square)

    def _read(self, index: int) -> bytes:
        name = self.prefix + self.names[index]
        if not self.path.is_file():
            try:
                return (self.path / name).read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {self.path / name}: {error}.") from error
        if self._zip is None:
            self._zip = zipfile.ZipFile(self.path)
        if self._zip.getinfo(name).file_size > _MAX_BYTES:
            raise UserError(f"{name} in {self.path} is larger than {_MAX_BYTES} bytes.")
        try:
            return self._zip.read(name)
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {name} in {self.path}: {error}.") from error

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None}  # an open file cannot be pickled


Parts = tuple[str, ...]


def _is_visible(parts: Parts) -> bool:
    return not any(p.startswith(".") or p == "__MACOSX" for p in parts)


def _folder_members(path: pathlib.Path) -> tuple[list[Parts], list[Parts]]:
    """Images and folders below a folder, as parts of their relative paths."""
    images, folders = [], []
    for folder, subfolders, files in os.walk(path):
        parts = pathlib.Path(folder).relative_to(path).parts
        subfolders[:] = [name for name in subfolders if _is_visible((name,))]
        folders += [(*parts, name) for name in subfolders]
        images += [(*parts, name) for name in files]
    return _only_images(images), folders


def _zip_members(path: pathlib.Path) -> tuple[list[Parts], list[Parts]]:
    """Images and folders in a zip file, as parts of their paths."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"data.path {str(path)!r} is neither a folder nor a zip file ({error})."
        ) from error
    images = _only_images([tuple(n.split("/")) for n in names if not n.endswith("/")])
    folders = {tuple(n.rstrip("/").split("/")) for n in names if n.endswith("/")}
    folders |= {i[:depth] for i in images for depth in range(1, len(i))}
    return images, sorted(f for f in folders if _is_visible(f))


def _only_images(parts: list[Parts]) -> list[Parts]:
    return sorted(
        p for p in parts if _is_visible(p) and p[-1].lower().endswith(SUFFIXES)
    )


def _strip_prefix(
    images: list[Parts], folders: list[Parts]
) -> tuple[str, list[Parts], list[Parts]]:
    """Takes off outer folders that only wrap the classes, as zip files have them."""
    prefix = ""
    while True:
        top = {p[0] for p in (*images, *folders)}
        if len(top) != 1 or any(len(p) < 3 for p in images) or not images:
            return prefix, images, folders
        prefix += f"{top.pop()}/"
        images = [p[1:] for p in images]
        folders = [p[1:] for p in folders if len(p) > 1]


def _refuse_mixed(parts: Sequence[Parts]) -> None:
    if any(len(p) < 3 for p in parts):
        raise UserError(
            "the folders train/ and test/ must hold class folders, as train/ash/1.jpg; "
            "there are images directly inside them."
        )


def _refuse_loose(parts: Sequence[Parts], depth: int, path: pathlib.Path) -> None:
    loose = [p for p in parts if len(p) <= depth]
    if not parts or loose:
        found = f"{len(loose)} image(s) outside any folder" if loose else "no images"
        raise UserError(
            f"{path} holds {found}; expected one folder a class with images that end "
            f"in {', '.join(SUFFIXES)}."
        )


def _read(tree: Tree, expected: Expected) -> Listing:
    """Lists the images as they are split when read directly."""
    del expected  # there are no official numbers
    source = ImageFolder(tree.root, 1)
    half = len(source.class_names) // 2
    records = []
    for number, (name, label) in enumerate(
        zip(source.names, source.labels.tolist(), strict=True)
    ):
        role = source.roles[number] if source.roles else None
        records.append(
            Record(
                path=str(source.path / (source.prefix + name)),
                name=name,
                class_id=source.class_names[label],
                role=role or ("train" if label < half else "test"),
            )
        )
    layout = "class folders in train/ and test/" if source.roles else "class folders"
    names = {name: name for name in source.class_names}
    records.sort(key=lambda r: (ROLES.index(r.role), r.class_id, r.name))
    return Listing(layout, records, names)


def _open(config) -> ImageFolder:
    if not config.path:
        raise UserError(
            "data.path is not set; give a folder or a zip file with one folder a "
            "class: --config.data.path=DIR"
        )
    return ImageFolder(config.path, config.load_size, square=config.square)


DATASET = DataSet(name="image_folder", read=_read, open=_open)
