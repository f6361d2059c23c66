"""Prepared data sets: ArrayRecords with random access.

`python -m abe_jax.prepare` writes them:

DIR/cub200/1.0.0/cub200-train.array_record-00000 ...     a TFDS data set
DIR/cub200/1.0.0/index.npz      label, role, box and name of each record, in order
"""

import functools
import hashlib
import os
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from abe_jax.data.decoding import (
    RelativeBox,
    decode,
    decode_stored,
    reason,
    require_known_square,
)
from abe_jax.errors import UserError

INDEX_FILE = "index.npz"
VERSION = "1.0.0"
ROLES = ("train", "test", "query", "gallery")


class PreparedRecords:
    """Random access to the images of a prepared data set, as RGB squares.

    Picklable, safe to read from many threads, and light: files are opened when read.

    Attributes:
      labels: int32 `[N]`, index into `class_names`.
      class_names: names of the classes, in the order of their official ids.
      roles: `[N]`, "train", "test", "query" or "gallery".
      stored_size: short side of the stored images, pixels; 0 for original sizes.
      storage: the same in words.
      num_skipped: images that were left out when the data set was prepared.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        size: int,
        *,
        square: str = "centre",
        box_crop: bool = False,
    ):
        """Reads the index; no image.

        Args:
          folder: with one prepared data set: `DIR/cub200/1.0.0`.
          size: side of the squares that indexing returns, pixels.
          square: "centre", "squeeze" or "pad"; see `decoding.decode`.
          box_crop: whether only the bounding box of the object is taken.

        Raises:
          UserError: there is no prepared data set, it is damaged, it lacks boxes, or
            `square` is unknown.
        """
        self.folder = pathlib.Path(folder)
        self.size = size
        self._square = require_known_square(square)
        index = _read_index(self.folder)
        self.labels = index["label"]
        self.class_names = tuple(_texts(index["class_name"]))
        self.roles = np.array(ROLES)[index["role"]]
        self.stored_size = int(index["size"])
        short = self.stored_size
        sides = f"short side {short}" if short else "original size"
        self.storage = f"JPEG, {sides}, quality {int(index['quality'])}"
        self.num_skipped = int(index["num_skipped"])
        if box_crop and not index["has_boxes"]:
            raise UserError(
                f"data.box_crop: {self.folder} was prepared without bounding boxes; "
                "prepare it again from the official files, or switch it off."
            )
        unusable = np.isnan(index["box"]).any(axis=1)
        if box_crop and unusable.any():
            raise UserError(
                f"data.box_crop: {unusable.sum():,} images of {self.folder} have a box "
                "that lies outside of them, or are turned by their EXIF tag, the first "
                f"is {_texts(index['name'])[unusable.argmax()]!r}; correct them and "
                "prepare it again, or switch it off."
            )
        self._boxes = index["box"] if box_crop else None
        self._checksums = index["checksum"]
        self._records = _open_shards(
            self.folder, _texts(index["shard"]), index["shard_length"].tolist()
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Path of each image in the data set that was prepared; read anew each time."""
        return tuple(_texts(_read_index(self.folder)["name"]))

    @property
    def stamp(self) -> str:
        """A hash of the index, which holds a checksum of each image."""
        return hashlib.sha256((self.folder / INDEX_FILE).read_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        """The image as uint8 `[size, size, 3]` RGB.

        Raises:
          UserError: the record cannot be read.
        """
        box: RelativeBox | None = None
        if self._boxes is not None:
            top, left, bottom, right = self._boxes[index].tolist()
            box = (top, left, bottom, right)
        name = f"record {index} of {self.folder}"
        if self.stored_size == self.size and box is None:
            return decode_stored(self.jpeg(index), self.size, name, square=self._square)
        return decode(self.jpeg(index), self.size, name, square=self._square, box=box)

    def jpeg(self, index: int) -> bytes:
        """The stored JPEG file of an image.

        Raises:
          UserError: the record cannot be read.
        """
        parse, parse_error = example_parser()
        try:
            example = parse(self._records[index])
            image = example.features.feature["image"].bytes_list.value[0]
        except (IndexError, parse_error, OSError, RuntimeError, ValueError) as error:
            raise self._damaged(index, reason(error)) from error
        if zlib.crc32(image) != self._checksums[index]:
            raise self._damaged(index, "it has changed")
        return image

    def _damaged(self, index: int, why: str) -> UserError:
        return UserError(
            f"cannot read record {index} of {self.folder}: {why}; the files are "
            "damaged: delete the folder and prepare it again."
        )


@functools.cache
def example_parser() -> tuple[Callable[[bytes], Any], type[Exception]]:
    """The parser of a record and the error it raises; TFDS is imported when needed."""
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_pb2

    # The module makes the class when it is imported, which pyright cannot see.
    return tf_example_pb2.Example.FromString, message.DecodeError  # pyright: ignore


def find(data_dir: str | os.PathLike[str], dataset: str) -> pathlib.Path | None:
    """Folder of a prepared data set below `data_dir`, or None."""
    folder = pathlib.Path(data_dir) / dataset / VERSION
    return folder if (folder / INDEX_FILE).exists() else None


def _read_index(folder: pathlib.Path) -> dict[str, np.ndarray]:
    path = folder / INDEX_FILE
    try:
        with np.load(path, allow_pickle=False) as content:
            return dict(content)
    except Exception as error:  # a damaged zip file fails in many ways
        raise UserError(
            f"cannot read {path}: {reason(error)}; delete the folder and prepare it "
            "again with python -m abe_jax.prepare."
        ) from error


def _open_shards(
    folder: pathlib.Path, names: Sequence[str], lengths: Sequence[int]
) -> ArrayRecordDataSource:
    paths = [str(folder / name) for name in names]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{folder} lacks {missing[0]!r}, one of {len(names)} files of records; "
            "delete the folder and prepare it again."
        )
    try:
        # A record is small: handing it to a pool of threads takes longer than reading.
        records = ArrayRecordDataSource(paths, {"max_parallelism": "0"})
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot read the records of {folder}: {error}; delete the folder and "
            "prepare it again."
        ) from error
    if len(records) != sum(lengths):
        raise UserError(
            f"{folder} holds {len(records):,} records, its index {sum(lengths):,}; "
            "delete the folder and prepare it again."
        )
    return records


def _texts(lines: np.ndarray) -> list[str]:
    return lines.tobytes().decode("utf-8", "surrogateescape")[:-1].split("\0")
