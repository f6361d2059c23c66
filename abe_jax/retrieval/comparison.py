"""What is compared with what: labelled queries and a gallery, checked and numbered."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from abe_jax.retrieval.inputs import check_lengths, check_widths, own_rows_of
from abe_jax.retrieval.labels import labels_of, number_alike, number_labels
from abe_jax.retrieval.rows import Rows


@dataclass(frozen=True)
class Comparison:
    """Queries and a gallery with numbered labels, and who leaves out whom.

    Attributes:
      queries, gallery: the embeddings; the same object where one set is both.
      given_labels: [Q], the queries' labels as they were given.
      labels, gallery_labels: [Q] and [N] int32, from 0.
      groups, gallery_groups: [Q] and [N] int32; a query leaves out the gallery rows of
        its group, among them itself where one set is both. None: nothing is left out.
      negatives_left_out: whether a group holds rows of several labels.
      num_positives: [Q] int, gallery rows of the query's label that are not left out.
      by_label: [N] int, gallery rows, those of one label side by side.
      ends: [labels + 1] int, where in `by_label` each label begins, and ends.
    """

    queries: Rows
    gallery: Rows
    given_labels: np.ndarray
    labels: np.ndarray
    gallery_labels: np.ndarray
    groups: np.ndarray | None
    gallery_groups: np.ndarray | None
    negatives_left_out: bool
    num_positives: np.ndarray
    by_label: np.ndarray
    ends: np.ndarray

    @property
    def within(self) -> bool:
        """Whether the queries are the gallery."""
        return self.queries is self.gallery

    def members(self, label: int) -> np.ndarray:
        """Gallery rows of a label, ascending."""
        return self.by_label[self.ends[label] : self.ends[label + 1]]


def compare(
    embeddings: Any,
    labels: Any,
    gallery_embeddings: Any | None,
    gallery_labels: Any | None,
    own_rows: Any | None,
    groups: Any | None,
    gallery_groups: Any | None,
) -> Comparison:
    """Checks what `evaluate_retrieval` is given; a ValueError says what is wrong."""
    if (gallery_embeddings is None) != (gallery_labels is None):
        raise ValueError(
            "gallery_embeddings and gallery_labels belong together; give both, or "
            "neither to search the embeddings themselves."
        )
    within = gallery_embeddings is None
    queries = gallery = Rows(embeddings, "embeddings")
    y = gy = given = labels_of(labels, "labels", queries.number)
    if not within:
        gallery = Rows(gallery_embeddings, "gallery_embeddings")
        check_widths(queries, gallery.name, gallery.dim)
        gy = labels_of(gallery_labels, "gallery_labels", gallery.number)
    check_lengths(queries, float(gallery.norms.max()))
    y, gy = number_labels(y, gy, "labels", "gallery_labels")
    left, right = _groups(
        queries.number, gallery.number, within, own_rows, groups, gallery_groups
    )
    ends = np.r_[0, np.cumsum(np.bincount(gy, minlength=int(y.max()) + 1))]
    wanted = np.diff(ends)[y]
    several = False
    if left is not None and right is not None:
        # Rows of the query's label that its group leaves out are no positives.
        number = np.int64(max(left.max(), right.max()) + 3)
        both, gallery_both = number_alike(
            y * number + (left + 2), gy * number + (right + 2)
        )
        sizes = np.bincount(gallery_both, minlength=int(both.max()) + 1)
        wanted = wanted - sizes[both]
        in_group = np.bincount(right[right >= 0], minlength=1 + max(0, int(left.max())))
        alone = np.where(left >= 0, in_group[left], 0) == sizes[both]
        several = not bool(alone.all())
    return Comparison(
        queries,
        gallery,
        given,
        y,
        gy,
        left,
        right,
        several,
        wanted,
        np.argsort(gy, kind="stable"),
        ends,
    )


def _groups(
    queries: int,
    gallery: int,
    within: bool,
    own_rows: Any | None,
    groups: Any | None,
    gallery_groups: Any | None,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Numbers for the groups of queries and gallery rows; negative ones never match."""
    if own_rows is not None and groups is not None:
        raise ValueError(
            "own_rows and groups are two ways to leave rows out; give one."
        )
    if within:
        if own_rows is not None or gallery_groups is not None:
            name = "gallery_groups" if own_rows is None else "own_rows"
            raise ValueError(
                f"{name} needs gallery_embeddings: without them the queries are the "
                "gallery, and each leaves itself out."
            )
        numbers = np.arange(queries, dtype=np.int32)
        if groups is not None:
            found = labels_of(groups, "groups", queries)
            numbers, _ = number_labels(found, found, "groups", "groups")
        return numbers, numbers
    if (groups is None) != (gallery_groups is None):
        raise ValueError(
            "groups and gallery_groups belong together where there is a gallery."
        )
    if own_rows is not None:
        left = own_rows_of(own_rows, queries, gallery)
        assert left is not None
        return left.astype(np.int32), np.arange(gallery, dtype=np.int32)
    if groups is None:
        return None, None
    left, right = number_labels(
        labels_of(groups, "groups", queries),
        labels_of(gallery_groups, "gallery_groups", gallery),
        "groups",
        "gallery_groups",
    )
    # A number below 0 never meets one of the other side.
    number = int(max(left.max(), right.max())) + 1
    met = np.bincount(right, minlength=number)[left] > 0
    asked = np.bincount(left, minlength=number)[right] > 0
    return np.where(met, left, -1), np.where(asked, right, -2)
