"""Batches from Grain: the sampler's order, every image once, each host its part."""

import os
import signal

import numpy as np
import pytest

from abe_jax import data
from abe_jax.data import samplers
from abe_jax.data.memory import InMemory
from abe_jax.data.pipeline import Subset
from abe_jax.errors import UserError
from configs import default


class Numbered:
    """Images that show their own number."""

    def __init__(self, number):
        self.labels = (np.arange(number) // 5).astype(np.int32)
        self.class_names = tuple(map(str, range(-(-number // 5))))
        self.storage = "made"
        self.names = tuple(map(str, range(number)))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return np.full((2, 2, 3), index, np.uint8)


def subset_of(number, first=0):
    source = Numbered(number)
    return Subset(source, np.arange(first, number))


def read(start=0, stop=50, batch_size=16, **reading):
    subset = subset_of(103, first=10)
    sampler = samplers.ClassSampler(subset.labels, batch_size, 4, seed=0)
    batches = data.train_batches(
        subset, sampler, start=start, stop=stop, reading=data.Reading(**reading)
    )
    return [(b["image"][:, 0, 0, 0], b["label"]) for b in batches]


@pytest.fixture(scope="module")
def expected():
    return read(num_threads=1)


def assert_same(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_batches_are_the_samplers_in_its_order(expected):
    subset = subset_of(103, first=10)
    sampler = samplers.ClassSampler(subset.labels, 16, 4, seed=0)
    for step, (numbers, labels) in enumerate(expected):
        np.testing.assert_array_equal(numbers, subset.indices[sampler.batch(step)])
        # Counted from the first class of the part, which images 10 to 14 are.
        np.testing.assert_array_equal(labels, numbers // 5 - 2)


@pytest.mark.parametrize(
    "reading", [{"num_threads": 7}, {"num_workers": 2}], ids=["threads", "workers"]
)
def test_threads_and_workers_change_nothing(expected, reading):
    assert_same(read(**reading), expected)


def test_a_restart_goes_on_with_the_same_batches(expected):
    assert_same(read(stop=20) + read(start=20), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_their_parts_of_the_same_batches(expected, processes):
    parts = [
        read(process_index=index, process_count=processes) for index in range(processes)
    ]
    whole = [
        tuple(np.concatenate(pieces) for pieces in zip(*step, strict=True))
        for step in zip(*parts, strict=True)
    ]
    assert_same(whole, expected)


def test_processes_must_divide_the_batch():
    with pytest.raises(UserError, match="16 images is not divisible by 3 processes"):
        read(process_count=3)


@pytest.mark.parametrize("number", [1, 15, 16, 17, 64, 101])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_reads_every_image_once(number, processes):
    subset = subset_of(number)
    numbers, positions = [], []
    for index in range(processes):
        reading = data.Reading(process_index=index, process_count=processes)
        own = 16 // processes
        for step, batch in enumerate(data.evaluation_batches(subset, 16, reading)):
            assert len(batch["image"]) == own
            first = 16 * step + own * index
            real = max(0, min(number - first, own))
            numbers += batch["image"][:real, 0, 0, 0].tolist()
            positions += range(first, first + real)
            assert (batch["image"][real:, 0, 0, 0] == number - 1).all()  # fills it
    assert sorted(positions) == list(range(number))
    assert numbers == positions


def test_a_bad_image_is_told_from_a_thread():
    class Bad(Numbered):
        def __getitem__(self, index):
            raise UserError(f"cannot read {index}.png as an image: broken.")

    subset = Subset(Bad(20), np.arange(20))
    with pytest.raises(UserError, match="cannot read 0.png"):
        list(data.evaluation_batches(subset, 4, data.Reading()))


def test_a_worker_that_is_killed_is_told():
    class Killed(Numbered):
        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does

    subset = Subset(Killed(20), np.arange(20))
    with pytest.raises(
        UserError, match="killed .exit code -9.* lower data.num_workers"
    ):
        list(data.evaluation_batches(subset, 4, data.Reading(num_workers=1)))


@pytest.mark.parametrize("length", [0, 1, 2, 7, 30, 1000])
def test_evenly(length):
    for most in range(1, 40):
        found = data.evenly(length, most)
        assert len(found) == min(length, most)
        assert (np.diff(found) > 0).all()
        if len(found) > 1:
            assert found[0] == 0 and found[-1] == length - 1
            assert np.ptp(np.diff(found)) <= 1


class Counted(Numbered):
    """Counts how often each image is read in this process."""

    def __init__(self, number):
        super().__init__(number)
        self.reads = np.zeros(number, int)

    def __getitem__(self, index):
        self.reads[index] += 1
        return super().__getitem__(index)


def test_what_is_in_a_batch_more_than_once_is_read_once():
    """Of the last batch most is padding, of a small class some images repeat."""
    source = Counted(8)  # five of a class, three of another
    subset = Subset(source, np.arange(8))
    list(data.evaluation_batches(subset, 6, data.Reading()))
    assert (source.reads == 1).all()
    sampler = samplers.ClassSampler(subset.labels, 10, 5, seed=0)
    list(data.train_batches(subset, sampler, start=0, stop=1, reading=data.Reading()))
    assert (source.reads == 2).all()


def test_what_is_kept_in_memory_is_read_once_whatever_the_workers():
    """Workers would each keep a copy, and read anew at every evaluation."""
    config = default.get_config().data
    config.in_memory, config.num_workers, config.num_threads = True, 2, 1
    reading = data.Reading.of_process(config, 0, 1)
    source = Counted(40)
    subset = Subset(InMemory(source), np.arange(40))
    sampler = samplers.ClassSampler(subset.labels, 8, 4, seed=0)
    for _ in range(2):
        list(data.train_batches(subset, sampler, start=0, stop=30, reading=reading))
        list(data.evaluation_batches(subset, 8, reading))
    assert (source.reads == 1).all()
    config.in_memory = False
    assert data.Reading.of_process(config, 0, 1).num_workers == 2
