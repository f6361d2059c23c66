"""Any folder of images, one folder a class, as `abe_jax.data.image_folder` reads it.

    photos/ash/1.jpg  photos/oak/1.webp ...                     classes only
    photos/train/ash/1.jpg ...  photos/test/oak/1.jpg ...       explicit split

Without `train/` and `test/` the first half of the sorted classes trains.
"""

from abe_jax.data.datasets.listing import Expected, Listing, Record, Tree
from abe_jax.data.image_folder import ImageFolder
from abe_jax.data.prepared import ROLES

EXPECTED: Expected = {}


def read(tree: Tree, expected: Expected = EXPECTED) -> Listing:
    """Lists the images.

    Args:
      tree: files of the folder.
      expected: not used; there are no official numbers.

    Raises:
      UserError: no classes, an empty one, fewer than two, or images outside of them.
    """
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
