"""From indices to batches of pixels, on the host, through Grain.

One element of a Grain data set is a whole batch: the sampler says which images it
holds, threads or worker processes decode them. Every process reads only its own part
of the global batch. Nothing here imports jax: workers must not touch a device. A caller
that may stop early must close the generator, which also ends its workers.
"""

import atexit
import dataclasses
import gc
import re
import signal
from collections.abc import Callable, Generator, Sequence
from multiprocessing import resource_tracker
from typing import Protocol

import grain
import grain.multiprocessing
import numpy as np

from abe_jax import interrupts
from abe_jax.data import workers
from abe_jax.data.samplers import Sampler
from abe_jax.errors import UserError

Batch = dict[str, np.ndarray]


class ImageSource(Protocol):
    """Random access to images; picklable, safe to read from many threads.

    Attributes:
      labels: int32 `[N]`, class of each image, an index into `class_names`.
      class_names: name of each class.
      storage: how the pixels are stored, in words; what changes the pixels changes it.
      stamp: text that changes when the files do, found without reading the images.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    storage: str

    @property
    def stamp(self) -> str: ...

    @property
    def names(self) -> Sequence[str]:
        """Path-like name of each image, wherever the data lies."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """An image, uint8 `[H, W, 3]` RGB, of one size for all."""
        ...


class SplitSource(ImageSource, Protocol):
    """All images of a data set.

    Attributes:
      roles: `[N]`, the part of each: "train", "test", "query" or "gallery".
    """

    @property
    def roles(self) -> Sequence[str] | np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Subset:
    """Part of a source: the classes that train, or those that are evaluated.

    Attributes:
      source: all images.
      indices: int64 `[n]`, those of the part, in ascending order.
    """

    source: ImageSource
    indices: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int32 `[n]`, class of each image of the part."""
        return self.source.labels[self.indices]

    @property
    def names(self) -> list[str]:
        """Name of each image of the part; prepared data read them anew each time."""
        names = self.source.names
        return [names[int(index)] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> np.ndarray:
        return self.source[int(self.indices[position])]

    def spread(self, number: int) -> "Subset":
        """`number` images of the part, or all, evenly spread over it."""
        return Subset(self.source, self.indices[evenly(len(self), number)])


def evenly(length: int, most: int) -> np.ndarray:
    """At most `most` positions below `length`: evenly spread, ascending, each once."""
    return np.linspace(0, length - 1, min(length, most)).astype(int)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How this process reads.

    Attributes:
      num_threads: threads that decode batches, where there are no workers.
      num_workers: processes that decode batches; 0 for threads of this process, as
        must be where images are kept in memory, which processes do not share.
      process_index: number of this host process.
      process_count: number of host processes; each reads its part of every batch.
    """

    num_threads: int = 4
    num_workers: int = 0
    process_index: int = 0
    process_count: int = 1

    @classmethod
    def of_process(cls, config, index: int, count: int) -> "Reading":
        """As the `data` section of a config says, for one of the host processes."""
        workers = 0 if config.in_memory else config.num_workers
        return cls(config.num_threads, workers, index, count)

    def own_part(self, rows: np.ndarray) -> np.ndarray:
        """This process's rows of a global batch.

        Raises:
          UserError: the batch is not divisible by the number of processes.
        """
        if len(rows) % self.process_count:
            raise UserError(
                f"a global batch of {len(rows)} images is not divisible by "
                f"{self.process_count} processes."
            )
        return np.split(rows, self.process_count)[self.process_index]


def train_batches(
    subset: Subset, sampler: Sampler, *, start: int, stop: int, reading: Reading
) -> Generator[Batch]:
    """Batches of steps `start` to `stop - 1`, in order.

    Yields:
      "image": uint8 `[B, H, W, 3]`; "label": int32 `[B]`, the class among those of the
      subset, from 0; B this process's part.

    Raises:
      UserError: an image cannot be read, a process that decodes was killed, or the
        batch is not divisible by the number of processes.
    """
    _, labels = np.unique(subset.labels, return_inverse=True)
    load = _LoadBatch(subset, sampler.batch, labels.astype(np.int32), reading)
    return _read(load, range(start, stop))


def evaluation_batches(
    subset: Subset, batch_size: int, reading: Reading
) -> Generator[Batch]:
    """Every image of a part exactly once, in order; copies of the last fill the batch.

    Yields:
      "image": uint8 `[B, H, W, 3]`; B this process's part of `batch_size`.

    Raises:
      UserError: as `train_batches`.
    """

    def rows(step: int) -> np.ndarray:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        return np.minimum(positions, len(subset) - 1)

    load = _LoadBatch(subset, rows, None, reading)
    return _read(load, range(-(-len(subset) // batch_size)))


def _read(load: "_LoadBatch", steps: range) -> Generator[Batch]:
    reading = load.reading
    batches = grain.MapDataset.range(steps.start, steps.stop).map(load)
    # A worker is one decoder; threads in it would only compete for its interpreter.
    threads = 1 if reading.num_workers else reading.num_threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    stream = batches.to_iter_dataset(options)
    if reading.num_workers:
        number = grain.MultiprocessingOptions(
            num_workers=reading.num_workers, per_worker_buffer_size=2
        )
        _start_resource_tracker()
        stream = stream.mp_prefetch(number, _start_worker)
    if not steps:
        return
    iterator = iter(stream)
    try:
        for batch in iterator:
            yield batch
            del batch  # memory shared with workers is given back before anything else
            interrupts.raise_if_one_waits()
    except RuntimeError as error:
        killed = re.search(
            r"terminated unexpectedly with exit code (-?\d+)", str(error)
        )
        if not killed:
            raise
        raise UserError(
            f"a decoding process was killed (exit code {killed[1]}), most likely for "
            "want of memory or of /dev/shm; lower data.num_workers, or set it to 0 for "
            "threads."
        ) from error
    finally:
        iterator.close()  # ends the workers, and frees the memory shared with them
        if reading.num_workers:
            # Semaphores in reference cycles would be freed at some later time, perhaps
            # while others are being made, which Python 3.13 warns of.
            del iterator
            gc.collect()


@atexit.register
def wait_until_memory_is_freed() -> None:
    """Waits until all memory that workers shared and nobody holds is given back."""
    gc.collect()  # what is held in circles only
    # Grain does this in a thread; when Python exits, it drops what is left to do there.
    thread = grain.multiprocessing.SharedMemoryArray._del_thread_pool
    if thread is not None:
        thread.apply(int)  # comes after all that waits: there is one thread


def _start_resource_tracker() -> None:
    """Starts the process that clears up after killed ones, deaf to lost connections.

    By itself it ignores SIGINT and SIGTERM only; it keeps what is blocked as it starts.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _start_worker(index: int, count: int) -> None:
    del index, count
    workers.follow_main_process()
    # Clusters and lost connections send them to all processes. The main one goes on for
    # another step, and saves, and then closes this one.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@dataclasses.dataclass(frozen=True)
class _LoadBatch:
    subset: Subset
    rows: Callable[[int], np.ndarray]
    labels: np.ndarray | None
    reading: Reading

    def __call__(self, step: int) -> Batch:
        own = self.reading.own_part(self.rows(int(step)))
        images = {"image": self._images(own)}
        return images if self.labels is None else images | {"label": self.labels[own]}

    def _images(self, rows: np.ndarray) -> np.ndarray:
        first = self.subset[rows[0]]
        images = np.empty((len(rows), *first.shape), first.dtype)
        places: dict[int, int] = {}  # of small classes, and of the end, rows repeat
        for number, row in enumerate(rows.tolist()):
            place = places.setdefault(row, number)
            if place < number:
                images[number] = images[place]
            else:  # while it is still in the cache
                images[number] = self.subset[row] if number else first
        return images
