"""Stanford Online Products at full size, with generated images, from files to Recall@K.

    python benchmarks/sop_rehearsal.py --folder=FOLDER
    python benchmarks/sop_rehearsal.py --folder=FOLDER --scale=0.01

Writes 120,053 images in the official layout, prepares them, reads an epoch of training
batches and every test image once, and measures Recall@1, 10, 100 and 1000 among as many
embeddings as there are test images. The embeddings are the images' own pixels, reduced
to 512 numbers: no network, so that what is measured is all but the network. Prints the
seconds of each part and the largest resident memory up to its end, children included.
"""

import argparse
import pathlib
import threading
import time

import numpy as np
import psutil
import side_by_side
from absl import flags
from PIL import Image

from abe_jax import data, retrieval
from abe_jax.data import samplers
from abe_jax.data.datasets import sop
from abe_jax.prepare import prepare

BATCH_SIZE = 64
RECALL_AT = (1, 10, 100, 1000)


def write_files(root: pathlib.Path, expected: sop.Expected) -> None:
    """Images of 300 x 260 pixels, a colour pattern a class, in twelve folders."""
    rng = np.random.default_rng(0)
    class_id = image_id = 0
    for role, (classes, images) in expected.items():
        lines = ["image_id class_id super_class_id path"]
        for number in range(classes):
            class_id += 1
            folder = root / f"kind{class_id % 12}_final"
            folder.mkdir(parents=True, exist_ok=True)
            pattern = rng.integers(40, 216, (6, 7, 3))
            for i in range(images // classes + (number < images % classes)):
                image_id += 1
                noisy = np.clip(pattern + rng.normal(0, 25, pattern.shape), 0, 255)
                image = Image.fromarray(noisy.astype(np.uint8))
                name = f"{folder.name}/{110000000000 + class_id}_{i}.JPG"
                image.resize((300, 260)).save(root / name, quality=90)
                lines.append(f"{image_id} {class_id} {class_id % 12 + 1} {name}")
        (root / f"Ebay_{role}.txt").write_text("\n".join(lines) + "\n")


class Meter:
    """Seconds of each part, and the largest memory so far."""

    def __init__(self):
        self._largest = 0
        self._process = psutil.Process()
        self._start = time.perf_counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            total = 0
            for process in [self._process, *self._process.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self._largest = max(self._largest, total)
            time.sleep(0.2)

    def print_row(self, what: str, number: int) -> None:
        """Prints a line about what ended now."""
        seconds = time.perf_counter() - self._start
        print(
            f"{what:<28}{number:>9,} images{seconds:>8.0f} s"
            f"{number / seconds:>9.0f} images/s{self._largest / 2**20:>8,.0f} MiB",
            flush=True,
        )
        self._start = time.perf_counter()


def embed(subset: data.Subset) -> np.ndarray:
    """Each image's pixels as 512 numbers of unit length, `[n, 512]` float32."""
    projection = np.random.default_rng(1).normal(size=(16 * 16 * 3, 512))
    rows = np.zeros((len(subset), 512), np.float32)
    batches = data.evaluation_batches(subset, BATCH_SIZE, data.Reading())
    for start, batch in zip(range(0, len(rows), BATCH_SIZE), batches, strict=True):
        small = batch["image"][: len(rows) - start, 8::16, 8::16]
        small = small.reshape(len(small), -1) / 128.0 - 1.0
        rows[start : start + BATCH_SIZE] = small @ projection
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def main() -> None:
    """Writes, prepares, reads, measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, help="with 8 GB left")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--num_processes", type=int, default=2)
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    root, scale = pathlib.Path(arguments.folder), arguments.scale
    expected = {
        role: (round(classes * scale), round(images * scale))
        for role, (classes, images) in sop.DATASET.expected.items()
    }
    total = sum(images for _, images in expected.values())
    meter = Meter()
    source = root / "Stanford_Online_Products"
    write_files(source, expected)
    meter.print_row("files written", total)
    print(
        prepare(
            "sop",
            source,
            root / "prepared",
            expected=expected,
            num_processes=arguments.num_processes,
        )
    )
    meter.print_row("prepared", total)
    config = side_by_side.config("sop")
    config.update({"data": {"path": str(root / "prepared")}})
    splits = data.create(config.data)
    sampler = samplers.PairSampler(splits.train.labels, BATCH_SIZE, seed=0)
    steps = len(splits.train) // BATCH_SIZE
    batches = data.train_batches(
        splits.train, sampler, start=0, stop=steps, reading=data.Reading()
    )
    meter.print_row("an epoch read", sum(len(batch["label"]) for batch in batches))
    embeddings = embed(splits.evaluation)
    meter.print_row("test images read", len(embeddings))
    ks = [k for k in RECALL_AT if k < len(embeddings)]
    recall = retrieval.recall_at_k(embeddings, splits.evaluation.labels, ks)
    meter.print_row("Recall@K measured", len(embeddings))
    print({k: round(value, 4) for k, value in recall.items()})


if __name__ == "__main__":
    main()
