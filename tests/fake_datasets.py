"""Writes data sets in the layouts that people have, with tiny files.

Each function takes a folder and the numbers wanted: role -> (classes, images), the
class ids counting on from role to role, as in the official data.
"""

import csv
import io
import math
import pathlib
import zipfile

import numpy as np
from PIL import Image
from scipy import io as matlab

# Large enough for the smallest training run, small enough to be written at once.
SMALL = {
    "cub200": {"train": (8, 33), "test": (8, 34)},
    "cars196": {"train": (8, 33), "test": (8, 34)},
    "sop": {"train": (8, 33), "test": (7, 30)},
    "inshop": {"train": (8, 33), "query": (8, 18), "gallery": (8, 17)},
}

BOX = (3.0, 2.0, 13.0, 12.0)  # left, top, right, bottom


def jpeg(name, size=(20, 16)):
    """A JPEG file whose colour and bytes depend on the name."""
    colour = tuple(np.frombuffer(name.encode()[-12:].rjust(12), np.uint8)[[3, 7, 11]])
    buffer = io.BytesIO()
    Image.new("RGB", size, tuple(map(int, colour))).save(buffer, "JPEG")
    return buffer.getvalue() + name.encode()  # what follows the image is not read


def no_image(name):
    """Readers of layouts decode no image; that contents differ is enough."""
    return name.encode()


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_images(root, names, content):
    for folder in {name.rpartition("/")[0] for name in names}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        with open(f"{root}/{name}", "wb") as file:
            file.write(content(name))


def write_lines(root, name, lines):
    write(root, name, "".join(f"{line}\n" for line in lines).encode())


def rows(expected):
    """(role, class id, number within the class), in order."""
    first = 1
    for role, (classes, images) in expected.items():
        for class_id in range(first, first + classes):
            extra = class_id - first < images % classes
            for number in range(images // classes + extra):
                yield role, class_id, number
        first += classes


def cub200(root, expected, content=jpeg):
    names, labels = [], []
    for _, class_id, number in rows(expected):
        names.append(f"{class_id:03}.Bird_{class_id}/Bird_{number:04}.jpg")
        labels.append(class_id)
    write_images(root / "CUB_200_2011" / "images", names, content)
    base = root / "CUB_200_2011"
    numbered = list(enumerate(names, 1))
    write_lines(base, "images.txt", [f"{i} {n}" for i, n in numbered])
    write_lines(
        base, "image_class_labels.txt", [f"{i} {c}" for i, c in enumerate(labels, 1)]
    )
    x0, y0, x1, y1 = BOX
    box = f"{x0} {y0} {x1 - x0} {y1 - y0}"
    write_lines(base, "bounding_boxes.txt", [f"{i} {box}" for i, _ in numbered])
    write_lines(base, "train_test_split.txt", [f"{i} {i % 2}" for i, _ in numbered])
    return base


def cub200_classes(root, expected, content=jpeg, halves=("",)):
    """Class folders only, or those of the classification split."""
    names = []
    for _, class_id, number in rows(expected):
        half = halves[number % len(halves)]
        names.append(f"{half}{class_id:03}.Bird_{class_id}/Bird_{number:04}.jpg")
    write_images(root, names, content)
    return root


def _annotations(root, name, records):
    """A MATLAB struct array from a list of dicts."""
    array = np.empty((1, len(records)), [(key, object) for key in records[0]])
    for i, record in enumerate(records):
        array[0, i] = tuple(record.values())
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    matlab.savemat(root / name, {"annotations": array})


def _meta(root, name, total):
    names = np.array([[car_name(i) for i in range(1, total + 1)]], object)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    matlab.savemat(root / name, {"class_names": names})


def car_name(class_id):
    return f"Car {class_id:03} SUV/Van 2012"


def _corners():
    return dict(zip(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), BOX, strict=True))


def total_classes(expected):
    return sum(classes for classes, _ in expected.values())


def cars196_form_a(root, expected, content=jpeg):
    records = [
        {
            "relative_im_path": f"car_ims/{i:06}.jpg",
            **_corners(),
            "class": class_id,
            "test": number % 2,
        }
        for i, (_, class_id, number) in enumerate(rows(expected), 1)
    ]
    write_images(root, [r["relative_im_path"] for r in records], content)
    _annotations(root, "cars_annos.mat", records)
    _meta(root, "devkit/cars_meta.mat", total_classes(expected))
    return root


def _halves(expected):
    """The classification split: every class in both; (class id, file) by half."""
    halves = {"train": [], "test": []}
    for _, class_id, number in rows(expected):
        part = halves["train" if number % 2 else "test"]
        part.append((class_id, f"{len(part) + 1:05}.jpg"))
    return halves


def cars196_form_b(root, expected, content=jpeg, nested=False):
    for half, part in _halves(expected).items():
        folder = f"cars_{half}/cars_{half}" if nested else f"cars_{half}"
        write_images(root, [f"{folder}/{name}" for _, name in part], content)
        records = [
            {**_corners(), "class": class_id, "fname": name} for class_id, name in part
        ]
        bare = [{k: v for k, v in r.items() if k != "class"} for r in records]
        if half == "train":
            _annotations(root, "devkit/cars_train_annos.mat", records)
        else:
            _annotations(root, "cars_test_annos_withlabels.mat", records)
            _annotations(root, "devkit/cars_test_annos.mat", bare)
    _meta(root, "devkit/cars_meta.mat", total_classes(expected))
    return root


def cars196_nested(root, expected, content=jpeg):
    return cars196_form_b(root, expected, content, nested=True)


def cars196_by_class(root, expected, content=jpeg):
    for half, part in _halves(expected).items():
        names = [
            f"car_data/car_data/{half}/{car_name(c).replace('/', '-')}/{n}"
            for c, n in part
        ]
        write_images(root, names, content)
        lines = [f"{n},3,2,13,12,{c}" for c, n in part]
        write_lines(root, f"anno_{half}.csv", lines)
    names = [car_name(i) for i in range(1, total_classes(expected) + 1)]
    write_lines(root, "names.csv", names)
    return root


def cars196_parquet(root, expected, content=jpeg):
    import pyarrow
    from pyarrow import parquet

    (root / "data").mkdir(parents=True, exist_ok=True)
    for half, part in _halves(expected).items():
        for shard in range(2):
            mine = part[shard::2]
            images = [{"bytes": content(f"{half}{n}"), "path": n} for _, n in mine]
            table = pyarrow.table({"image": images, "label": [c - 1 for c, _ in mine]})
            path = root / "data" / f"{half}-{shard:05}-of-00002.parquet"
            parquet.write_table(table, path)
    return root


def sop(root, expected, content=jpeg):
    base = root / "Stanford_Online_Products"
    lines = {role: ["image_id class_id super_class_id path"] for role in expected}
    names = []
    for i, (role, class_id, number) in enumerate(rows(expected), 1):
        kind = ("bicycle", "chair", "sofa")[class_id % 3]
        names.append(f"{kind}_final/{111085122871 + class_id}_{number}.JPG")
        lines[role].append(f"{i} {class_id} {class_id % 3 + 1} {names[-1]}")
    write_images(base, names, content)
    for role, text in lines.items():
        write_lines(base, f"Ebay_{role}.txt", text)
    write_lines(base, "Ebay_info.txt", ["image_id class_id super_class_id path"])
    return base


def inshop(root, expected, content=jpeg, *, images="Img/img", eval_folder="Eval/"):
    """Any of the roots: {Img/img,Eval}, {img,Eval}, flat, img_highres."""
    trained = expected["train"][0]
    table, names = [], []
    for role, class_id, number in rows(expected):
        # The gallery has the items of the queries, which come before it.
        item = class_id if role != "gallery" else class_id - expected["query"][0]
        assert (item > trained) == (role != "train")
        below = f"WOMEN/Dresses/id_{item:08}/{role}_{number}_front.jpg"
        names.append(f"{images}/{below}")
        table.append((f"img/{below}", f"id_{item:08}", role))
    write_images(root, names, content)
    head = [str(len(table)), "image_name item_id evaluation_status"]
    lines = [f"{n:<70} {i:<14}   {s}" for n, i, s in table]
    write_lines(root, f"{eval_folder}list_eval_partition.txt", head + lines)
    head[1] = "image_name clothes_type pose_type x_1 y_1 x_2 y_2"
    corners = "  ".join(f"{x:03.0f}" for x in BOX)
    lines = [f"{n:<70} 3 1 {corners}" for n, _, _ in table]
    write_lines(root, "Anno/list_bbox_inshop.txt", head + lines)
    return root


def inshop_root(root, expected, content=jpeg):
    return inshop(root, expected, content, images="img")


def inshop_flat(root, expected, content=jpeg):
    return inshop(root, expected, content, images="img", eval_folder="")


def inshop_highres(root, expected, content=jpeg):
    return inshop(root, expected, content, images="Img/img_highres")


# Layout -> (data set, writer, a part of what the reader says about it).
LAYOUTS = {
    "cub200": ("cub200", cub200, "official CUB_200_2011"),
    "cub200 classes": ("cub200", cub200_classes, "class folders"),
    "cars196 form A": ("cars196", cars196_form_a, "form A"),
    "cars196 form B": ("cars196", cars196_form_b, "form B"),
    "cars196 nested": ("cars196", cars196_nested, "nested doubly"),
    "cars196 by class": ("cars196", cars196_by_class, "CSV"),
    "cars196 parquet": ("cars196", cars196_parquet, "parquet"),
    "sop": ("sop", sop, "Stanford_Online_Products"),
    "inshop": ("inshop", inshop, "Inshop_Clothes/{Img/img,Eval}"),
    "inshop root": ("inshop", inshop_root, "root/{img,Eval}"),
    "inshop flat": ("inshop", inshop_flat, "flat: img"),
    "inshop highres": ("inshop", inshop_highres, "Img/img_highres"),
}


def rewrite_csv(path, change):
    """Applies a function to every row of a CSV file."""
    with open(path, newline="") as file:
        changed = [change(row) for row in csv.reader(file)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(changed)


def write_locked_zip(path):
    """An archive that needs a password."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("img_highres/1.jpg", b"locked")
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[6] |= 1  # the flag of encryption, in both headers
    data[central + 8] |= 1
    path.write_bytes(bytes(data))


def class_folders(root, classes=("ash", "elm", "fir", "oak"), images=2):
    """A folder a class, of small images; returns the root."""
    for number, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(images):
            image = Image.new("RGB", (20, 16), (40 * number % 256, 60 * i, 77))
            image.save(folder / f"{i}.jpg")
    return root


def contents(folder):
    """Relative path -> bytes of all files, and the folders, of a folder."""
    return {
        p.relative_to(folder): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


class NoBuilder:
    """Stores nothing, so that a hundred listings take no time; they must be clean."""

    bad, copies, digests, unusable_boxes = (), 0, {}, ()

    def __init__(self, dataset, *, listing, data_dir, **_):
        assert listing.records
        assert all(
            map(math.isfinite, (x for r in listing.records for x in r.box or ()))
        )
        self.folder = pathlib.Path(data_dir) / dataset.name / "1.0.0"

    def download_and_prepare(self, *, download_dir):
        pathlib.Path(download_dir).mkdir(parents=True)
        self.folder.mkdir(parents=True)
        (self.folder / "index.npz").touch()


def store_nothing(monkeypatch):
    """Has `prepare` do everything but encode and store images."""
    from abe_jax.data.prepare import builders, command

    monkeypatch.setattr(builders, "RetrievalBuilder", NoBuilder)
    monkeypatch.setattr(command, "_summary", str)
