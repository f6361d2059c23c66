"""The input pipeline against its parts and its peer, side by side in one run.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --memory_steps=10000

Prepares a folder of generated photographs (short side 256, JPEG quality 95) and reads
them in batches of 64, in the order of the pair sampler, in four ways: decoding alone,
on one core and without any pipeline; the pipeline with threads; the pipeline with
worker processes; a PyTorch DataLoader with the same records, the same decoder and as
many workers. The ways take turns, and the fastest turn of each counts. The peer is
left out, and named, where PyTorch is not installed.
Read the ratios, not the images per second. A busy machine changes both; processor time
an image, which is shown too, suffers least.
"""

import argparse
import importlib.util
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import side_by_side
import tqdm
from absl import flags
from PIL import Image

from abe_jax import data, host_memory
from abe_jax.data import prepared, samplers
from abe_jax.data.decoding import decode_stored
from abe_jax.prepare import prepare

BATCH_SIZE = 64


def make_photographs(folder: pathlib.Path, number: int) -> None:
    """Noise in three sizes of detail, 341 x 256 pixels, 16 images a class."""
    rng = np.random.default_rng(0)
    for i in range(number):
        image = np.zeros((256, 341, 3))
        for detail, strength in [(8, 90), (64, 40), (256, 8)]:
            shape = (detail * 3 // 4, detail, 3)
            noise = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
            layer = noise.resize((341, 256), Image.Resampling.BICUBIC)
            image += (np.asarray(layer, float) / 255 - 0.5) * 2 * strength
        path = folder / f"{i // 16:05}" / f"{i % 16}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        pixels = np.clip(image + 128, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=95)


def config_of(data_dir: pathlib.Path):
    """The `data` section for a prepared folder of images, read at 256 pixels."""
    config = side_by_side.config("default")
    fields = {"name": "image_folder", "path": str(data_dir), "load_size": 256}
    config.update({"data": fields})
    return config.data


def decode_only(subset: data.Subset, steps: int) -> Iterator[int]:
    """Stored JPEG bytes to arrays, one after another; nothing is batched."""
    source = subset.source
    assert isinstance(source, prepared.PreparedRecords)
    files = [source.jpeg(int(i)) for i in subset.indices[:512]]
    for step in range(steps):
        for i in range(BATCH_SIZE):
            file = files[(step * BATCH_SIZE + i) % len(files)]
            assert decode_stored(file, 256, "it").shape == (256, 256, 3)
        yield step


def pipeline(
    subset: data.Subset, steps: int, reading: data.Reading
) -> Iterator[data.Batch]:
    """Batches of this project."""
    sampler = samplers.PairSampler(subset.labels, BATCH_SIZE, seed=0)
    return data.train_batches(subset, sampler, start=0, stop=steps, reading=reading)


class TorchDataset:
    """The same records for PyTorch: an image and its label."""

    def __init__(self, subset: data.Subset):
        self._subset = subset
        self._labels = subset.labels

    def __len__(self) -> int:
        return len(self._subset)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.array(self._subset[index]), int(self._labels[index])


def torch_loader(subset: data.Subset, steps: int, workers: int) -> Iterator:
    """Batches of PyTorch's DataLoader, shuffled."""
    from torch.utils.data import DataLoader, RandomSampler  # pyright: ignore[reportMissingImports]

    dataset = TorchDataset(subset)
    sampler = RandomSampler(dataset, replacement=True, num_samples=steps * BATCH_SIZE)
    return iter(
        DataLoader(
            dataset,  # pyright: ignore[reportArgumentType]
            BATCH_SIZE,
            sampler=sampler,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
        )
    )


def cpu_seconds() -> float:
    """Processor time of this process and its children so far."""
    me = psutil.Process()
    times = [p.cpu_times() for p in [me, *me.children(recursive=True)]]
    return sum(t.user + t.system for t in times)


def rate(
    make: Callable[[int], Iterator], steps: int, warm: int = 16
) -> tuple[float, float]:
    """Images per second, and microseconds of processor time an image.

    The start of processes, the first batches and the last ones are left out.
    """
    batches = make(steps + 2 * warm)
    for _ in range(warm):
        next(batches)
    start, cpu_start = time.perf_counter(), cpu_seconds()
    for _ in range(steps):
        next(batches)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    del batches
    images = steps * BATCH_SIZE
    return images / seconds, cpu / images * 1e6


def memory_mb() -> float:
    """Resident memory of this process and its children, MiB."""
    me = psutil.Process()
    everyone = [me, *me.children(recursive=True)]
    return sum(p.memory_info().rss for p in everyone) / 2**20


def watch_memory(subset: data.Subset, steps: int, reading: data.Reading) -> None:
    """Prints the memory at ten moments of a long run."""
    batches = pipeline(subset, steps, reading)
    for step, _ in enumerate(tqdm.tqdm(batches, total=steps, disable=None), 1):
        if step % max(1, steps // 10) == 0:
            print(f"step {step:>6}: {memory_mb():>8.0f} MiB", flush=True)


def main() -> None:
    """Prepares, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=150, help="batches a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory_steps", type=int, default=0)
    arguments = parser.parse_args()
    host_memory.use_large_pages()  # as abe_jax.main does
    flags.FLAGS.mark_as_parsed()  # Grain's processes read absl's flags
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        make_photographs(root / "photos", arguments.images)
        print(prepare("image_folder", root / "photos", root / "data"))
        subset = data.create(config_of(root / "data")).train
        threads = data.Reading(num_threads=cores)
        workers = data.Reading(num_workers=cores)
        if arguments.memory_steps:
            watch_memory(subset, arguments.memory_steps, threads)
            return
        ways: dict[str, Callable[[int], Iterator]] = {
            "decode only, 1 core": lambda steps: decode_only(subset, steps),
            f"pipeline, {cores} threads": lambda n: pipeline(subset, n, threads),
            f"pipeline, {cores} workers": lambda n: pipeline(subset, n, workers),
        }
        if importlib.util.find_spec("torch"):
            ways[f"PyTorch DataLoader, {cores} workers"] = lambda n: torch_loader(
                subset, n, cores
            )
        else:
            print("left out: PyTorch is not installed")
        rates = dict.fromkeys(ways, 0.0)
        costs = dict.fromkeys(ways, float("inf"))
        for _ in range(arguments.repeats):
            for name, make in ways.items():
                turn, cost = rate(make, arguments.steps)
                print(f"{name}: {turn:.0f} images/s, {cost:.0f} us", flush=True)
                rates[name] = max(rates[name], turn)
                costs[name] = min(costs[name], cost)
        alone, peer = "decode only, 1 core", f"PyTorch DataLoader, {cores} workers"
        bound = rates[alone] * cores
        print(
            f"{'':<32}{'images/s':>9}{'of bound':>9}{'of peer':>9}"
            f"{'CPU us':>8}{'of bound':>9}{'of peer':>9}"
        )
        for name, value in rates.items():
            cost = costs[name]
            print(
                f"{name:<32}{value:>9.0f}{value / bound:>9.2f}"
                f"{value / rates.get(peer, math.nan):>9.2f}{cost:>8.0f}"
                f"{costs[alone] / cost:>9.2f}{costs.get(peer, math.nan) / cost:>9.2f}"
            )
        print(f"bound: decode only x {cores} cores = {bound:.0f} images/s; of CPU time")
        print("an image, the share that decoding takes, and the peer's as a multiple.")


if __name__ == "__main__":
    main()
