"""Stanford Online Products: class ids 1 to 11,318 train, 11,319 to 22,634 test.

Layout: `Ebay_train.txt` and `Ebay_test.txt` (a header line, then `image_id class_id
super_class_id path`) beside the twelve folders `bicycle_final/` ... that hold the
images. It has no boxes.
"""

from abe_jax.data.datasets.definition import DataSet
from abe_jax.data.datasets.listing import (
    Expected,
    Listing,
    Record,
    as_id,
    check_counts,
    check_disjoint,
    check_files,
    check_ids,
    make_listing,
)
from abe_jax.data.datasets.tree import Tree
from abe_jax.errors import UserError


def read(tree: Tree, expected: Expected) -> Listing:
    """Finds the layout and lists the images.

    Args:
      tree: files of the data set, at any depth.
      expected: numbers to hold it to, such as the official ones.

    Raises:
      UserError: no known layout, or not the official data.
    """
    bases = tree.folders_with("Ebay_train.txt", "Ebay_test.txt")
    if len(bases) != 1:
        found = f"it {len(bases)} times" if bases else "none"
        raise UserError(
            f"{tree.root} should hold Ebay_train.txt beside Ebay_test.txt, as Stanford "
            f"Online Products has them, once; it holds {found}."
        )
    base = bases[0]
    records, names = [], []
    for role in expected:
        annotation = f"Ebay_{role}.txt"
        for _, class_id, _, name in tree.rows(base + annotation, 4, skip=1):
            number = as_id(class_id, annotation)
            names.append(name)
            path = tree.files.get(base + name, "")
            records.append(Record(path, name, str(number), role))
    check_disjoint("SOP", records, "Ebay_test.txt")
    check_ids(
        {int(r.class_id) for r in records}, expected, "Ebay_train.txt and Ebay_test.txt"
    )
    first_test = expected["train"][0] + 1
    for record in records:
        if (int(record.class_id) >= first_test) != (record.role == "test"):
            raise UserError(
                f"Ebay_{record.role}.txt lists class {record.class_id}, but classes "
                f"from {first_test:,} on are the test part: the labels are shifted or "
                "the files exchanged; take the original files."
            )
    present = [p.removeprefix(base) for p in tree.images(base)]
    check_files(names, present, "Ebay_train.txt and Ebay_test.txt", base or tree.root)
    check_counts("SOP", records, expected)
    class_names = {
        r.class_id: f"{r.name.partition('/')[0]}/{r.class_id}" for r in records
    }
    layout = "official Stanford_Online_Products folder"
    return make_listing(layout, records, class_names)


DATASET = DataSet(
    name="sop",
    read=read,
    expected={"train": (11_318, 59_551), "test": (11_316, 60_502)},
    citation=(
        "Oh Song et al., Deep Metric Learning via Lifted Structured "
        "Feature Embedding, CVPR 2016"
    ),
)
