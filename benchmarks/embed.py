"""Embedding a folder of images, against its parts: decoding alone, the model alone.

    python benchmarks/embed.py --workdir=runs/quickstart --images=10000

The parts are timed on some of the images. Where devices compute on the host's own
cores, as on a CPU, the best possible time is the sum of the two. The memory is the
largest of the process after a fifth of the images and at the end: it must not grow with
their number.
"""

import argparse
import io
import itertools
import pathlib
import resource
import tempfile
import time
from typing import Any

import jax
import numpy as np
import side_by_side
from PIL import Image

import abe_jax
from abe_jax import host_memory, parallel
from abe_jax.apply.images import ImageFile, decoded, find
from abe_jax.errors import UserError


def write_images(folder: pathlib.Path, number: int, side: int) -> None:
    """Writes JPEGs `side` x `side`: smooth noise, so that files are of usual sizes."""
    rng = np.random.default_rng(0)
    few = []
    for _ in range(50):
        small = Image.fromarray(
            rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8)
        )
        file = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(
            file, "JPEG", quality=90
        )
        few.append(file.getvalue())
    for index, content in zip(range(number), itertools.cycle(few), strict=False):
        (folder / f"{index:06}.jpg").write_bytes(content)


def peak_mb() -> float:
    """The largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bare_seconds(model: Any, count: int) -> float:
    """Seconds an image of the model alone, on images that are there already."""
    mesh = parallel.make_mesh(jax.local_devices())
    program = parallel.map_over_devices(model.embed_program, mesh, rows_out=True)
    side, batch = model.config.data.load_size, model.config.eval.batch_size * mesh.size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    rows = parallel.split_rows(pixels, mesh)
    embeddings = jax.block_until_ready(program(model.variables, rows))
    batches = max(1, count // batch)
    start = time.perf_counter()
    for _ in range(batches):
        embeddings = program(model.variables, rows)
    jax.block_until_ready(embeddings)
    return (time.perf_counter() - start) / (batches * batch)


def decoding_seconds(model: Any, files: list[ImageFile]) -> float:
    """Seconds an image of reading and decoding alone."""
    start = time.perf_counter()
    for _, result in decoded(files, model.decode):
        assert isinstance(result, np.ndarray), result
    return (time.perf_counter() - start) / len(files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="of a trained model")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=256, help="of the images, pixels")
    parser.add_argument("--json", help="file to append the rows to")
    args = parser.parse_args()
    host_memory.use_large_pages()  # as abe_jax.main does
    model = abe_jax.load(args.workdir)
    with tempfile.TemporaryDirectory() as folder:
        write_images(pathlib.Path(folder), args.images, args.side)
        files = list(find(folder))
        few = files[: args.images // 5]
        bare = bare_seconds(model, len(few))
        decoding = decoding_seconds(model, few)
        list(model.embed_files(few, refuse))
        early = peak_mb()
        start = time.perf_counter()
        list(model.embed_files(files, refuse))
        seconds = (time.perf_counter() - start) / len(files)
    row = {
        "what": f"{args.images:,} JPEGs {args.side} x {args.side}",
        "images/s": 1 / seconds,
        "model alone/s": 1 / bare,
        "decoding alone/s": 1 / decoding,
        "share": (bare + decoding) / seconds,
        "memory, MB": early,
        "at the end, MB": peak_mb(),
    }
    side_by_side.show([row], args.json)


def refuse(file: ImageFile, error: UserError) -> None:
    """Every image here can be read."""
    raise AssertionError(f"{file}: {error}")


if __name__ == "__main__":
    main()
