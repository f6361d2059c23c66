"""TFDS builders that write ArrayRecords, without TensorFlow.

What they leave behind is a TFDS data set like any other:
`tfds.builder_from_directory(DIR).as_data_source("train")` reads it. Beside it lies
`index.npz`, all that a sampler needs to know without opening a record (see
`abe_jax.data.prepared`).

The builder is not registered: TFDS has a `cars196` of its own.
"""

import contextlib
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.core import dataset_info

from abe_jax.data import prepared
from abe_jax.data.datasets.definition import DataSet
from abe_jax.data.datasets.listing import Listing, Record
from abe_jax.data.decoding import RelativeBox
from abe_jax.data.prepare.encoding import WHOLE, Encoded, Storing, encode_files
from abe_jax.data.prepared import INDEX_FILE, ROLES, VERSION
from abe_jax.errors import UserError

_RECORDS_A_SHARD = 4096
# In place of a box, in the index.
_UNUSABLE: RelativeBox = (math.nan, math.nan, math.nan, math.nan)


class RetrievalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes a listing as a TFDS data set, one split a role, in its order.

    Attributes:
      bad: name and reason of each image that could not be stored, once it was run.
      copies: number of files outside of the training split that are equal to one in
        it, once it was run.
      digests: digest of each file that was stored, by its path, and None of each that
        could not be, once it was run.
      unusable_boxes: names of the images that are stored without theirs, once it was
        run.
    """

    VERSION = tfds.core.Version(VERSION)
    # Nothing is downloaded. TFDS would look for a file of checksums beside this one,
    # with a package that it does not install.
    url_infos = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        dataset: DataSet,
        *,
        listing: Listing,
        storing: Storing,
        data_dir: str,
        skip_bad: bool = False,
        num_processes: int = 1,
        progress: Callable[[int], Any] = lambda count: None,
    ):
        """Makes a builder.

        Args:
          dataset: which data set it is.
          listing: what to write.
          storing: how images are stored.
          data_dir: folder of all data sets; this one gets `data_dir/name/version`.
          skip_bad: whether files that are no usable images are left out.
          num_processes: how many encode images.
          progress: called with the number of images dealt with since the last call.
        """
        # TFDS takes it from the class, and would want one class a data set.
        self.name = dataset.name  # pyright: ignore[reportAttributeAccessIssue]
        self.bad: list[tuple[str, str]] = []
        self.copies = 0
        self.digests: dict[str, bytes | None] = {}
        self.unusable_boxes: list[str] = []
        self._dataset = dataset
        self._listing = listing
        self._storing = storing
        self._skip_bad = skip_bad
        # One pool of processes for all: records come by role, and so do the splits.
        self._encoded = encode_files(listing.records, storing, num_processes)
        self._progress = progress
        self._labels = {name: i for i, name in enumerate(listing.class_names)}
        self._checksums: list[int] = []  # of what was stored, as `_kept`
        self._kept: list[tuple[Record, Encoded]] = []
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return self._info_of(self)

    def _info_of(self, builder: Any) -> tfds.core.DatasetInfo:
        metadata = {
            "layout": self._listing.layout,
            "size": self._storing.size,
            "keep_original": self._storing.keep_original,
            "quality": self._storing.quality,
        }
        return tfds.core.DatasetInfo(
            builder=builder,
            description="Images for retrieval, each class in one part of the split.",
            citation=self._dataset.citation,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": np.int32,
                    "original_id": tfds.features.Text(),
                    "box": tfds.features.BBoxFeature(),
                    "role": tfds.features.Text(),
                    "source_path": tfds.features.Text(),
                }
            ),
            metadata=tfds.core.MetadataDict(metadata),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # nothing is downloaded
        records = self._listing.records
        parts = {role: [r for r in records if r.role == role] for role in ROLES}
        return {
            role: self._generate_examples(part) for role, part in parts.items() if part
        }

    def _generate_examples(
        self, records: Sequence[Record]
    ) -> Iterator[tuple[int, dict]]:
        """Key and features of each usable image, in order."""
        # `records` first: zip then ends before it takes an image of the next split.
        for key, (record, result) in enumerate(
            zip(records, self._encoded, strict=False)
        ):
            self._progress(1)
            if isinstance(result, str):
                self.bad.append((record.name, result))
                self.digests[record.path] = None
                continue
            if result.box is None:
                self.unusable_boxes.append(record.name)
            top, left, bottom, right = result.box or WHOLE
            self._kept.append((record, Encoded(b"", result.box, result.digest)))
            self._checksums.append(zlib.crc32(result.jpeg))
            self.digests[record.path] = result.digest
            yield (
                key,
                {
                    "image": result.jpeg,
                    "label": self._labels[record.class_id],
                    "original_id": _bytes(record.class_id),
                    "box": tfds.features.BBox(top, left, bottom, right),
                    "role": record.role,
                    "source_path": _bytes(record.name),
                },
            )

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        # TFDS's own writer gathers a gigabyte in memory and then sorts; these records
        # are in their order already, and go to the disk as they come.
        del download_config
        info = self._info_of(
            # With the temporary folder, which TFDS renames once all is written.
            dataset_info.DatasetIdentity.from_builder(self)
        )
        writer = tfds.core.SequentialWriter(
            info, _RECORDS_A_SHARD, file_format="array_record"
        )
        splits = self._split_generators(dl_manager)
        writer.initialize_splits(list(splits))
        with contextlib.closing(self._encoded):
            for name, examples in splits.items():
                self._write_split(writer, name, examples)
        if self.bad and not self._skip_bad:
            raise UserError(_bad_text(self.bad, len(self._listing.records)))
        assert len(self._kept) + len(self.bad) == len(self._listing.records)
        self._refuse_lost_parts()
        self._refuse_copies()
        self.info.set_splits(info.splits)
        self._write_index(pathlib.Path(self.data_dir))

    def _write_split(
        self,
        writer: tfds.core.SequentialWriter,
        name: str,
        examples: Iterator[tuple[int, dict]],
    ) -> None:
        chunk: list[dict] = []
        for _, example in examples:
            if self.bad and not self._skip_bad:
                continue  # it will be refused; what is left is only looked at
            chunk.append(example)
            if len(chunk) == 256:
                writer.add_examples({name: chunk})
                chunk = []
        writer.add_examples({name: chunk})
        writer.close_splits([name])

    def _refuse_lost_parts(self) -> None:
        """Without the bad images something must be left to train and to test with."""
        kept = {record.role for record, _ in self._kept}
        for role in dict.fromkeys(record.role for record in self._listing.records):
            if role not in kept:
                name, reason = self.bad[0]
                raise UserError(
                    f"no image of the {role!r} part can be used; the first bad one is "
                    f"{name} ({reason})."
                )

    def _refuse_copies(self) -> None:
        trained = {e.digest for r, e in self._kept if r.role == "train"}
        others = [e.digest for r, e in self._kept if r.role != "train"]
        self.copies = sum(digest in trained for digest in others)
        if self._dataset.expected and self.copies * 2 > len(others):
            raise UserError(
                f"{self.copies:,} of the {len(others):,} images that test are copies "
                "of training images: training images are offered as test images; "
                "unpack the archives again."
            )

    def _write_index(self, folder: pathlib.Path) -> None:
        """Reads every record back, and writes the index of them."""
        shards, lengths, checksums = [], [], {}
        for role, split in self.info.splits.items():
            assert split.filename_template is not None
            for number, length in enumerate(split.shard_lengths):
                path = pathlib.Path(
                    split.filename_template.sharded_filepath(
                        shard_index=number, num_shards=None
                    )
                )
                checksums[path.name] = _read_back(path)
                if len(checksums[path.name]) != length:
                    raise UserError(
                        f"{path.name} was not written whole; is the disk full?"
                    )
                shards.append((ROLES.index(role), path.name))
                lengths.append(length)
        # Splits come in the order of their names, records in that of the roles.
        order = sorted(range(len(shards)), key=lambda i: (shards[i][0], i))
        if sum(lengths) != len(self._kept):
            raise UserError(
                f"{len(self._kept):,} records were written, but {sum(lengths):,} are "
                "on the disk; is it full?"
            )
        stored = [c for i in order for c in checksums[shards[i][1]]]
        if stored != self._checksums:
            raise UserError(
                f"what lies in {folder} is not what was written there; is the disk "
                "damaged?"
            )
        records = [record for record, _ in self._kept]
        np.savez_compressed(
            folder / INDEX_FILE,
            label=np.array([self._labels[r.class_id] for r in records], np.int32),
            role=np.array([ROLES.index(r.role) for r in records], np.uint8),
            checksum=np.array(self._checksums, np.uint32),
            box=np.array([e.box or _UNUSABLE for _, e in self._kept], np.float32),
            name=_lines([r.name for r in records]),
            class_id=_lines(list(self._listing.class_names)),
            class_name=_lines(list(self._listing.class_names.values())),
            shard=_lines([shards[i][1] for i in order]),
            shard_length=np.array([lengths[i] for i in order], np.int64),
            size=np.int64(0 if self._storing.keep_original else self._storing.size),
            quality=np.int64(self._storing.quality),
            num_skipped=np.int64(len(self.bad)),
            has_boxes=np.bool_(any(r.box is not None for r in records)),
        )


def _read_back(path: pathlib.Path) -> list[int]:
    """Checksum of the image of each record of a file."""
    parse, parse_error = prepared.example_parser()
    checksums = []
    try:
        records = ArrayRecordDataSource([str(path)])
        for start in range(0, len(records), 64):
            numbers = range(start, min(start + 64, len(records)))
            for record in records.__getitems__(numbers):
                feature = parse(record).features.feature["image"]
                checksums.append(zlib.crc32(feature.bytes_list.value[0]))
    except (IndexError, parse_error, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot read back {path.name}, which was just written: {error}; is the "
            "disk full or damaged?"
        ) from error
    return checksums


def _bytes(text: str) -> bytes:
    """A name as it is on the disk, which may be no UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _lines(texts: Sequence[str]) -> np.ndarray:
    """Texts as bytes, a NUL after each: names hold line breaks, but none of these."""
    return np.frombuffer(_bytes("".join(f"{text}\0" for text in texts)), np.uint8)


def _bad_text(bad: Sequence[tuple[str, str]], total: int) -> str:
    named = "; ".join(f"{name} ({reason})" for name, reason in bad)
    return (
        f"{len(bad):,} of {total:,} images cannot be used: {named}. Fix them, or "
        "leave them out with --skip_bad."
    )
