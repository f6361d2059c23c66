"""The outputs of a frozen S, kept on disk: computed once, read in every step.

    FOLDER/KEY/features.array_record    a record an image, in the order of the part
    FOLDER/KEY/features.json            their number, length and dtype

The key is a hash of all that they depend on: S's weights, how images are prepared, and
the images themselves.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import Mesh

from abe_jax import augment, data, models, parallel, processes, train_step
from abe_jax.data.datasets.tree import local
from abe_jax.errors import UserError, require_known
from abe_jax.workdir import NotWritable

_log = logging.getLogger(__name__)

_RECORDS, _ABOUT = "features.array_record", "features.json"
_UNFINISHED = ".unfinished-"


class _Records(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes: ...


def check(config) -> None:
    """Raises UserError where a config's features cannot be kept, or need not be."""
    require_known("model.train", config.model.train, train_step.PARTS)
    if not config.data.feature_cache:
        return
    if config.model.train != "heads":
        raise UserError(
            "data.feature_cache keeps the outputs of a frozen S: set "
            "--config.model.train=heads, or leave the cache out."
        )
    if not augment.changes_nothing(config.augment):
        raise UserError(
            "data.feature_cache needs the same view of an image in every step: set "
            "--config.augment.crop=centre and every other field of augment that "
            "changes images to 0, or leave the cache out."
        )


def cached(
    subset: data.Subset,
    config,
    model: models.Embedder,
    state: train_step.TrainState,
    mesh: Mesh,
    check_stop: Callable[[], None] = lambda: None,
) -> data.Subset:
    """A part of the data as outputs of S, from the cache where that has them.

    Args:
      subset: images.
      config: the whole config; `data.feature_cache` is the folder.
      model: gives structure and preprocessing.
      state: its weights, replicated over the mesh.
      mesh: the devices.
      check_stop: called after each batch; what it raises leaves nothing behind.

    Returns:
      the part with `[F]` of S's output in place of each image.

    Raises:
      UserError: an image cannot be read, or the cache is damaged.
      NotWritable: the cache cannot be written.
    """
    cache = local(config.data.feature_cache, "data.feature_cache")
    folder = cache / _key(subset, config, model, state)
    if not processes.all_agree((folder / _ABOUT).exists()):
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(_Writer(folder))
            program = parallel.map_over_devices(
                train_step.make_features_step(model, config.data.image_size),
                mesh,
                mapping=config.parallel.mapping,
                rows_out=True,
            )
            size = config.eval.batch_size * mesh.size
            reading = data.Reading.of_process(config.data, *processes.place())
            batches = data.evaluation_batches(subset, size, reading)
            stack.callback(batches.close)
            every = -(-len(subset) // (10 * size))  # about ten lines
            for number, batch in enumerate(batches):
                images = parallel.split_rows(batch["image"], mesh)
                rows = program((state.params, state.model_state), images)
                found = processes.gather_rows(rows)[: len(subset) - number * size]
                writer.write(found)
                if number % every == every - 1 or writer.count == len(subset):
                    _log.info("features: %d of %d", writer.count, len(subset))
                check_stop()
    return _part(subset, *_read(folder, len(subset)))


def blank(subset: data.Subset, config, model: models.Embedder) -> data.Subset:
    """As `cached`, but of zeros: for a forecast, which writes nothing."""
    leaves = jax.tree.leaves(train_step.features_like(model, config.data.image_size))
    dtype = np.result_type(*(leaf.dtype for leaf in leaves))
    row = bytes(sum(leaf.size for leaf in leaves) * dtype.itemsize)
    return _part(subset, [row] * len(subset), dtype)


def _part(subset: data.Subset, records: _Records, dtype: np.dtype) -> data.Subset:
    return data.Subset(_Features(subset, records, dtype), np.arange(len(subset)))


def _key(
    subset: data.Subset, config, model: models.Embedder, state: train_step.TrainState
) -> str:
    digest = hashlib.sha256()
    spatial = state.params["spatial"], state.model_state.get("spatial", {})
    for path, leaf in jax.tree_util.tree_leaves_with_path(spatial):
        value = np.asarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    about = {
        "model": config.model.to_dict(),
        "preprocessing": dataclasses.asdict(model.preprocessing),
        "load_size": config.data.load_size,
        "image_size": config.data.image_size,
        "square": config.data.square,
        "box_crop": config.data.box_crop,
        "storage": subset.source.storage,
        "stamp": subset.source.stamp,
        "names": subset.names,
    }
    for name in (
        "pretrained",
        "attention_blocks",
        "attention_spread",
        "rematerialize",
        "learners_in_turn",
        "num_learners",
        "embedding_dim",
        "name",
    ):
        about["model"].pop(name)  # S does not depend on it
    digest.update(json.dumps(about, sort_keys=True).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


class _Writer:
    """Writes to a folder of another name, renamed once all records are written."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self.count = 0

    def __enter__(self) -> "_Writer":
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            _clear_left_over(self._folder.parent)
            self._unfinished = pathlib.Path(
                tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._folder.parent)
            )
            path = str(self._unfinished / _RECORDS)
            self._records = ArrayRecordWriter(path, "group_size:1")
        except (OSError, RuntimeError) as error:
            raise self._refused(error) from error
        return self

    def write(self, rows: np.ndarray) -> None:
        """Adds records `[n, F]`."""
        self._about = {"dtype": rows.dtype.name, "length": rows.shape[1]}
        try:
            for row in rows:
                self._records.write(row.tobytes())
        except (OSError, RuntimeError) as error:
            raise self._refused(error) from error
        self.count += len(rows)

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            self._records.close()
            if kind is None:
                about = {"count": self.count, **self._about}
                (self._unfinished / _ABOUT).write_text(json.dumps(about))
                try:
                    os.rename(self._unfinished, self._folder)
                except OSError as error:  # another process or run may be the first
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
        except (OSError, RuntimeError) as error:
            raise self._refused(error) from error
        finally:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def _refused(self, error: Exception) -> NotWritable:
        return NotWritable(
            f"cannot write data.feature_cache {self._folder.parent}: {error}; make "
            "room, choose another folder, or leave the cache out."
        )


def _clear_left_over(cache: pathlib.Path) -> None:
    """Removes what killed runs left: unfinished, and not written to for a day."""
    for folder in cache.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):  # another process may remove it as well
            written = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - written > 86_400:
                shutil.rmtree(folder)


def _read(folder: pathlib.Path, count: int) -> tuple[_Records, np.dtype]:
    """Opens a cache: its records and their dtype."""
    try:
        about = json.loads((folder / _ABOUT).read_text())
        dtype = jnp.dtype(about["dtype"])
        path = str(folder / _RECORDS)
        records = ArrayRecordDataSource([path], {"max_parallelism": "0"})
        whole = about["count"] == count == len(records)
        whole &= len(records[count - 1]) == about["length"] * dtype.itemsize
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise _damaged(folder, error) from error
    if not whole:
        raise _damaged(folder, "records are missing")
    return records, dtype


class _Features:
    """Random access to the kept outputs of S; picklable, as every source."""

    def __init__(self, subset: data.Subset, records: _Records, dtype: np.dtype):
        source = subset.source
        self.labels = subset.labels
        self.class_names = source.class_names
        self.storage = source.storage
        self.stamp = source.stamp
        self.names = subset.names
        self._records = records
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        """S's output for an image, `[F]`."""
        try:
            return np.frombuffer(self._records[index], self._dtype)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot read the features of {self.names[index]}: {error}; delete "
                "the folder data.feature_cache, and they are computed again."
            ) from error


def _damaged(folder: pathlib.Path, why: object) -> UserError:
    return UserError(
        f"cannot read the features in {folder}: {why}; delete that folder, and they "
        "are computed again."
    )
