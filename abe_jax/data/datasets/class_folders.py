"""How the images of a folder are arranged: one folder a class, perhaps in parts."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence

import numpy as np

from abe_jax.data.datasets.tree import Tree, count_suffixes
from abe_jax.data.decoding import SUFFIXES
from abe_jax.errors import UserError

_log = logging.getLogger(__name__)

# What people call the parts that they split data into, in upper or lower case.
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# "1", "01 ash", "class10"; not "1f600", whose digits are no number.
_NUMBERED = re.compile(r"([^0-9]*)([0-9]+)(?![0-9A-Za-z])")

Parts = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Images by class.

    Attributes:
      prefix: outer folders that only wrap the classes, or "".
      names: path of each image below them, with forward slashes, sorted.
      labels: int32 `[N]`, index into `class_names`.
      class_names: names of the class folders, in order.
      roles: `[N]`, "train" or "test": that of the folder's parts, or where it has none
        "train" for the first half of the classes.
      has_parts: whether it has.
    """

    prefix: str
    names: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    roles: tuple[str, ...]
    has_parts: bool


def arrange(tree: Tree) -> Arrangement:
    """Finds the classes and parts of a folder or zip file, and says what it leaves out.

    Raises:
      UserError: no classes, an empty one, fewer than two, images outside of them, or
        parts mixed with classes.
    """
    files = sorted(tuple(name.split("/")) for name in tree.files)
    images = [p for p in files if p[-1].lower().endswith(SUFFIXES)]
    others = [p for p in files if not p[-1].lower().endswith(SUFFIXES)]
    folders = [tuple(name.split("/")) for name in tree.folders]
    prefix = _prefix(images, folders)
    where = f"{tree.root}/{prefix}".rstrip("/")
    depth = prefix.count("/")
    images, others, folders = (
        [p[depth:] for p in paths if len(p) > depth]
        for paths in (images, others, folders)
    )
    roles = _roles(images, folders, where)
    depth = 1 if roles is None else 2
    _refuse_loose(images, others, depth, where)
    images = [p for p in images if roles is None or p[0] in roles]
    _refuse_empty(images, others, folders, depth, roles, where)
    class_names = _in_order({p[depth - 1] for p in images})
    if len(class_names) < 2:
        raise UserError(
            f"{where} holds {len(class_names)} class(es); at least 2 are needed, one "
            f"folder each{_beside_folders(images, depth)}."
        )
    _log_left_out(tree, [p for p in others if len(p) > depth])
    classes = [p[depth - 1] for p in images]
    trained = set(class_names[: len(class_names) // 2])
    number_of = {name: number for number, name in enumerate(class_names)}
    return Arrangement(
        prefix,
        tuple("/".join(p) for p in images),
        np.array([number_of[name] for name in classes], np.int32),
        tuple(class_names),
        tuple("train" if name in trained else "test" for name in classes)
        if roles is None
        else tuple(roles[p[0]] for p in images),
        roles is not None,
    )


def _prefix(images: Sequence[Parts], folders: Sequence[Parts]) -> str:
    """Outer folders that only wrap the classes, as zip files have them."""
    prefix: Parts = ()
    while True:
        depth = len(prefix)
        top = {p[depth] for p in (*images, *folders) if len(p) > depth}
        if len(top) != 1 or any(len(p) < depth + 3 for p in images) or not images:
            return "".join(f"{name}/" for name in prefix)
        prefix = (*prefix, top.pop())


def _roles(
    images: Sequence[Parts], folders: Sequence[Parts], where: str
) -> dict[str, str] | None:
    """Name of each folder that is a part to "train" or "test"; None without parts."""
    top = {p[0] for p in folders}
    parts = {name: _PARTS[name.lower()] for name in top if name.lower() in _PARTS}
    roles = sorted(parts.values())
    inside = [p for p in images if p[0] in parts]
    ordered = sorted(parts, key=lambda name: (list(_PARTS).index(name.lower()), name))
    shown = " and ".join(f"{name}/" for name in ordered)
    if len(set(roles)) < 2:
        if not parts or top == parts.keys() or any(len(p) < 3 for p in images):
            return None  # a class may well be called "train"
        raise UserError(
            f"{where} holds {shown} with folders in it, as parts of a data set have "
            f"them, beside {min(top - parts.keys())!r}; parts are called "
            f"{', '.join(_PARTS)}: rename the others, or move them elsewhere."
        )
    if top > parts.keys():
        if all(len(p) == 2 for p in inside):
            return None  # they hold images directly: classes that happen to be so named
        raise UserError(
            f"{where} holds {shown}, which are parts of a data set, beside "
            f"{min(top - parts.keys())!r} and perhaps others; move the class folders "
            "into the parts, or the parts elsewhere."
        )
    if len(set(roles)) < len(roles) or "train" not in roles:
        raise UserError(
            f"{where} holds {shown}; one part must be for training and one for "
            "testing: rename or remove the others."
        )
    if any(len(p) < 3 for p in inside):
        raise UserError(
            f"the folders {shown} must hold class folders, as train/ash/1.jpg; there "
            "are images directly inside them."
        )
    if "test" in roles and "val" in roles:
        unused = min(name for name, role in parts.items() if role == "val")
        count = sum(p[0] == unused for p in inside)
        _log.warning(
            "%s: %d images of %s/ are neither trained on nor tested with; "
            "data.validation_fraction holds classes of the training part out.",
            where,
            count,
            unused,
        )
        return {name: role for name, role in parts.items() if role != "val"}
    return {n: "train" if role == "train" else "test" for n, role in parts.items()}


def _refuse_loose(
    images: Sequence[Parts], others: Sequence[Parts], depth: int, where: str
) -> None:
    loose = [p for p in images if len(p) <= depth]
    if images and not loose:
        return
    found = "no images"
    if loose:
        found = f"{len(loose)} image(s) outside any folder, as {'/'.join(loose[0])!r}"
    if not images and others:
        found += f", but {count_suffixes(p[-1] for p in others)}"
    raise UserError(
        f"{where} holds {found}; expected one folder a class with images that end in "
        f"{', '.join(SUFFIXES)}."
    )


def _beside_folders(images: Sequence[Parts], depth: int) -> str:
    """Names an image that lies beside folders which may be meant as the classes."""
    beside = [p for p in images if len(p) == depth + 1]
    if not beside or len(beside) == len(images):
        return ""
    name = "/".join(beside[0])
    return f"; {name!r} lies beside folders that may be meant: move it elsewhere"


def _refuse_empty(
    images: Sequence[Parts],
    others: Sequence[Parts],
    folders: Sequence[Parts],
    depth: int,
    roles: dict[str, str] | None,
    where: str,
) -> None:
    empty = {p for p in folders if len(p) == depth and (roles is None or p[0] in roles)}
    empty -= {p[:depth] for p in images}
    if not empty:
        return
    first = min(empty)
    inside = count_suffixes(p[-1] for p in others if p[:depth] == first)
    raise UserError(
        f"{len(empty)} class folder(s) of {where} hold no image, the first is "
        f"{'/'.join(first)!r}{f' ({inside})' if inside else ''}; images end in "
        f"{', '.join(SUFFIXES)}. Put images there, or move it elsewhere."
    )


def _in_order(class_names: Iterable[str]) -> list[str]:
    """Sorted, by number where all have one after the same beginning: 1, 2, 10."""
    names = sorted(class_names)
    matches = [_NUMBERED.match(name) for name in names]
    if len({m[1] if m else None for m in matches}) != 1 or None in matches:
        return names
    numbers = {n: int(m[2]) for n, m in zip(names, matches, strict=True) if m}
    return sorted(names, key=lambda name: (numbers[name], name))


def _log_left_out(tree: Tree, others: Sequence[Parts]) -> None:
    if others:
        _log.warning(
            "%s: %d files beside the images are left out: %s.",
            tree.root,
            len(others),
            count_suffixes(p[-1] for p in others),
        )
    tree.log_left_out()
