"""What has to be said of a data set; one module each says it, as `DATASET`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from abe_jax.data.datasets.listing import Expected, Listing
from abe_jax.data.datasets.tree import Tree
from abe_jax.data.pipeline import SplitSource


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set: how it is read, and the protocol that its figures are held to.

    Attributes:
      name: as in `config.data.name`, `--dataset` and the folder of prepared records.
      read: finds out which layout the files of a tree have, and lists its images, for
        `abe_jax.prepare`; None where there is nothing to prepare.
      open: opens it as the `data` section of a config says, where it can be read
        without being prepared.
      expected: its official numbers; empty where there are none.
      parquet: whether `read` knows what `prepare.archives` makes of parquet files.
      citation: where it comes from.
      licence: what is known of the terms of its images, for a model's card.
    """

    name: str
    read: Callable[[Tree, Expected], Listing] | None = None
    open: Callable[[Any], SplitSource] | None = None
    expected: Expected = dataclasses.field(default_factory=dict)
    parquet: bool = False
    citation: str = ""
    licence: str = "that of the data set's authors; not checked by abe_jax"
