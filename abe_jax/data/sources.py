"""The images that a config names: generated, in a folder, or prepared."""

import logging
import pathlib

from abe_jax.data import prepared
from abe_jax.data.datasets import DATASETS
from abe_jax.data.datasets.tree import local
from abe_jax.data.decoding import require_known_square
from abe_jax.data.pipeline import SplitSource
from abe_jax.data.prepared import PreparedRecords
from abe_jax.errors import UserError, require_known

_log = logging.getLogger(__name__)


def open_source(config) -> SplitSource:
    """Opens the data that `config.data` describes; prepared where it is.

    Args:
      config: the `data` section of a config (see `configs/default.py`).

    Raises:
      UserError: the data is not there, or the fields do not fit it.
    """
    if config.load_size < config.image_size:
        raise UserError(
            f"data.load_size = {config.load_size} is below data.image_size = "
            f"{config.image_size}; images are cropped on the device, never enlarged."
        )
    require_known("data.name", config.name, DATASETS)
    require_known_square(config.square)
    dataset = DATASETS[config.name]
    path = local(config.path, "data.path") if config.path else None
    folder = prepared.find(path, config.name) if dataset.read and path else None
    if folder is not None:
        return _open_prepared(config, folder)
    if dataset.open is None:
        place = f"{config.path!r} holds no" if config.path else "is not set; give a"
        raise UserError(
            f"data.path {place} prepared {config.name}; make one with python -m "
            f"abe_jax.prepare --dataset={config.name} --source=... --data_dir=DIR, and "
            "give --config.data.path=DIR"
        )
    if config.box_crop:
        raise UserError(
            f"data.box_crop is for prepared data sets with boxes; {config.name!r} has "
            "none: switch it off."
        )
    return dataset.open(config)


def _open_prepared(config, folder: pathlib.Path) -> PreparedRecords:
    records = PreparedRecords(
        folder, config.load_size, square=config.square, box_crop=config.box_crop
    )
    if records.num_skipped:
        _log.warning(
            "%s was prepared without %d bad files: its Recall@K is not comparable with "
            "that of the whole data set.",
            folder,
            records.num_skipped,
        )
    stored, wanted = records.stored_size, config.load_size
    if 0 < stored < wanted or (config.box_crop and stored == wanted):
        what = "boxes of it" if config.box_crop else "images of it"
        _log.warning(
            "%s is stored with a short side of %d, and %s %s enlarged to "
            "data.load_size = %d; prepare it with a larger --size.",
            folder,
            stored,
            what,
            # Then it is the long side that becomes `load_size`.
            "may be" if config.square == "pad" else "are",
            wanted,
        )
    return records
