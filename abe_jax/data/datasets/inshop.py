"""In-Shop Clothes Retrieval (DeepFashion): items that train; queries and a gallery.

Layouts: `list_eval_partition.txt` (two header lines, then `image_name item_id
evaluation_status`) and its images, whose names begin with `img/`, in one of the roots
    Inshop_Clothes/{Img/img,Eval}      the official one
    root/{img,Eval}
    root/{img,list_eval_partition.txt}  flat
    the same with `img_highres/` in place of `img/`
Where both are there, `img/` is taken, which published figures use. Boxes are those of
`list_bbox_inshop.txt`, with `img/` only.
"""

import re

from abe_jax.data.datasets.definition import DataSet
from abe_jax.data.datasets.listing import (
    Box,
    Expected,
    Listing,
    Record,
    as_number,
    check_boxes,
    check_counts,
    check_disjoint,
    check_files,
    make_listing,
)
from abe_jax.data.datasets.tree import Tree, parent
from abe_jax.errors import UserError

_PARTITION = "list_eval_partition.txt"
_BOXES = "list_bbox_inshop.txt"
_ITEM = re.compile(r"id_\d{8}")


def read(tree: Tree, expected: Expected) -> Listing:
    """Finds the layout and lists the images.

    Args:
      tree: files of the data set, at any depth.
      expected: numbers to hold it to, such as the official ones.

    Raises:
      UserError: no known layout, or not the official data.
    """
    partitions = tree.find(_PARTITION)
    if len(partitions) != 1:
        raise UserError(
            f"{tree.root} should hold {_PARTITION} once, as In-Shop Clothes Retrieval "
            f"has it in Eval/; it holds it {len(partitions)} times."
        )
    partition = partitions[0]
    stated = tree.lines(partition)[0].strip()
    rows = tree.rows(partition, 3, skip=2)
    if stated != str(len(rows)):
        raise UserError(
            f"{_PARTITION} says {stated} images in its first line and lists "
            f"{len(rows):,}: the file is cut short or changed; take the original one."
        )
    for name, item, status in rows:
        if status not in expected:
            raise UserError(
                f"{_PARTITION} has the status {status!r} for {name!r}; known are "
                f"{', '.join(expected)}."
            )
        in_path = _ITEM.search(name)
        if not name.startswith("img/") or (in_path and in_path[0] != item):
            raise UserError(
                f"{_PARTITION} gives {name!r} the item {item!r}: the labels are "
                "shifted against the images; take the original file."
            )
    folder, layout = _image_folder(tree, partition, rows[0][0])
    present = ["img/" + p.removeprefix(folder) for p in tree.images(folder)]
    check_files([row[0] for row in rows], present, _PARTITION, folder)
    boxes = {} if folder.endswith("img_highres/") else _boxes(tree)
    check_boxes(boxes, [row[0] for row in rows], _BOXES)
    records = [
        Record(
            path=tree.files[folder + name.removeprefix("img/")],
            name=name,
            class_id=item,
            role=status,
            box=boxes.get(name),
        )
        for name, item, status in rows
    ]
    check_disjoint("In-Shop", records, _PARTITION)
    check_counts("In-Shop", records, expected)
    queried = {r.class_id for r in records if r.role == "query"}
    offered = {r.class_id for r in records if r.role == "gallery"}
    if queried != offered:
        raise UserError(
            f"In-Shop: {len(queried - offered):,} queried items have no gallery image "
            f"in {_PARTITION}; take the original file."
        )
    class_names = {record.class_id: record.class_id for record in records}
    return make_listing(layout, records, class_names)


def _image_folder(tree: Tree, partition: str, first: str) -> tuple[str, str]:
    """Folder of the images, which ends in "/", and the layout in words."""
    beside = parent(partition)
    above = parent(beside.rstrip("/"))
    for images in ("img/", "img_highres/"):
        for base, words in [
            (above + "Img/", "Inshop_Clothes/{Img/%s,Eval}"),
            (above, "root/{%s,Eval}"),
            (beside, "flat: %s beside " + _PARTITION),
            (beside + "Img/", "flat: Img/%s beside " + _PARTITION),
        ]:
            # Some archives nest the folder once more.
            for folder in (base + images + images, base + images):
                if any(p.startswith(folder) for p in tree.files):
                    if base == above == beside:
                        words = "flat: %s beside " + _PARTITION
                    return folder, words % images.rstrip("/")
    raise UserError(
        f"{tree.root} holds {_PARTITION} but not its images, such as {first!r}; put "
        "img/ (unpacked from img.zip) beside Eval/ or into Img/ beside it."
    )


def _boxes(tree: Tree) -> dict[str, Box]:
    """Left, top, right, bottom by image name, from the last four columns."""
    found = tree.find(_BOXES)
    boxes = {}
    for line in tree.lines(found[0])[2:] if found else ():
        name, *cells = line.split()
        if len(cells) < 4:
            raise UserError(
                f"{found[0]} has a line without four corners: {line.strip()[:60]!r}; "
                "take the original file."
            )
        x_1, y_1, x_2, y_2 = (as_number(c, found[0]) for c in cells[-4:])
        boxes[name] = (x_1, y_1, x_2, y_2)
    return boxes


DATASET = DataSet(
    name="inshop",
    read=read,
    expected={
        "train": (3_997, 25_882),
        "query": (3_985, 14_218),
        "gallery": (3_985, 12_612),
    },
    citation=(
        "Liu et al., DeepFashion: Powering Robust Clothes Recognition "
        "and Retrieval with Rich Annotations, CVPR 2016"
    ),
)
