"""Predicts a training step of ABE-8^512 on 1 to 1,024 devices: nothing is measured.

    python benchmarks/scaling.py [--measured=v5e=700] [--reached=0.5]

docs/scaling.md holds what it prints, the sources of the numbers, and what follows.

A step is the sum of its parts, as if none overlapped: the images through the model,
the device's rows of the pair matrix, and the collectives. The model takes as long as
the compiled program's arithmetic, or its bytes of main memory, at the device's peaks:
no device is faster. `--reached` is the share of that speed which devices reach;
`--measured` replaces the images per second of one device by a measured figure.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence

FLOAT = 4  # bytes
PARAMETERS = 12_047_040
EMBEDDING_DIM = 512
LEARNERS = 8
TRAINING = 3  # forward and backward, in units of forward
BATCH_NORM_LAYERS, BATCH_NORM_CHANNELS = 87, 10_944  # with trunk = "googlenet_bn"
PAIR_COPIES = 4  # products, distances, costs, gradient: an assumption
DECODED_PER_THREAD = 2868.0  # prepared JPEGs a second, benchmarks/input_pipeline.py

DEVICES = tuple(2**i for i in range(11))
PER_DEVICE = 64  # images, where the batch grows with the devices
BATCHES = (64, 256, 1024, 4096)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device and its links.

    Attributes:
      name: title of its column.
      peak: FLOP/s of convolutions in bfloat16.
      highest: how many times slower products of the highest precision are.
      memory: bytes.
      bandwidth: bytes/s of that memory.
      domain: devices that the fast links join.
      inner: bytes/s that a device sends over one of its fast links, one way.
      outer: bytes/s that a device sends to another domain, its share of the host's.
      inner_round: seconds a small message takes within the domain; assumed.
      outer_round: the same between domains; assumed.
      host_devices: devices a host feeds.
      compiled: topology and model of the compiled step, in tpu_compile.jsonl.
      measured: images/s of one device in training, where known.
    """

    name: str
    peak: float
    highest: float
    memory: float
    bandwidth: float
    domain: int
    inner: float
    outer: float
    inner_round: float
    outer_round: float
    host_devices: int
    compiled: tuple[str, str] | None = None
    measured: float | None = None

    def images_per_second(self, reached: float) -> float:
        """Images one device trains on per second, measured or predicted."""
        if self.measured is not None:
            return self.measured
        assert self.compiled
        operations, moved = compiled_image(*self.compiled)
        return reached / max(operations / self.peak, moved / self.bandwidth)


@functools.cache
def compiled_image(topology: str, model: str) -> tuple[float, float]:
    """FLOP, and bytes of main memory with padding, of a compiled step for one image.

    Those of the newest step of 64 images a device in bfloat16 at 224 x 224.
    """
    path = pathlib.Path(__file__).with_name("tpu_compile.jsonl")
    wanted = {"program": "step", "size": 224, "dtype": "bfloat16", "model": model}
    wanted["images a device"] = PER_DEVICE
    step = [
        line
        for line in map(json.loads, path.read_text().splitlines())
        if line["topology"].startswith(topology)
        and "GB of main memory, padded" in line
        and all(line[key] == value for key, value in wanted.items())
    ][-1]
    of_all = step["GFLOP of products"], step["GB of main memory, padded"]
    return of_all[0] * 1e9 / PER_DEVICE, of_all[1] * 1e9 / PER_DEVICE


_ON_TPU = ("v5e", "ABE-8, googlenet, learners in turn")
_ON_GPU = ("h100", "ABE-8, googlenet")
# fmt: off
MACHINES = (
    Machine("v5e", 197e12, 6, 16e9, 819e9, 256, 50e9, 3.125e9, 1e-6, 1e-5, 8, _ON_TPU),
    Machine("v5p", 459e12, 6, 95e9, 2765e9, 6144, 100e9, 6.25e9, 1e-6, 1e-5, 4,
            _ON_TPU),
    Machine("v6e", 918e12, 6, 32e9, 1640e9, 256, 100e9, 12.5e9, 1e-6, 1e-5, 8, _ON_TPU),
    Machine("H100", 989.4e12, 14.8, 80e9, 3350e9, 8, 450e9, 50e9, 3e-6, 1e-5, 8,
            _ON_GPU),
    # The measured one: two cores, as if joined by Ethernet of 10 Gb/s. Of a peak of
    # 0.197 TFLOP/s it is given 15%, for the pair matrix.
    Machine("CPU", 0.03e12, 1, math.nan, math.nan, 1, 1.25e9, 1.25e9, 5e-5, 5e-5, 1,
            measured=3.53),
)
# fmt: on


def ring_all_reduce_bytes(size: float, devices: int) -> float:
    """Bytes each device sends to sum `size` bytes around a ring of devices."""
    return 2 * (devices - 1) / devices * size


def all_reduce_seconds(size: float, devices: int, machine: Machine) -> float:
    """Sums `size` bytes over all devices: in the domain, across, in the domain.

    Each device of a domain sums its share of the bytes across the domains. Bandwidth is
    that of rings, latency that of trees. An all-gather to `size` bytes or a
    reduce-scatter of them takes half of it.
    """
    inside = min(devices, machine.domain)
    domains = math.ceil(devices / machine.domain)
    rounds_inside = 2 * math.ceil(math.log2(inside))
    rounds_across = 2 * math.ceil(math.log2(domains))
    return (
        ring_all_reduce_bytes(size, inside) / machine.inner
        + ring_all_reduce_bytes(size / inside, domains) / machine.outer
        + rounds_inside * machine.inner_round
        + rounds_across * machine.outer_round
    )


def gradient_bytes() -> int:
    """Of the all-reduce over the gradient of every parameter."""
    return PARAMETERS * FLOAT


def embedding_bytes(batch: int) -> int:
    """Of the all-gather of embeddings, and of the reduce-scatter of their gradient."""
    return batch * EMBEDDING_DIM * FLOAT


def label_bytes(batch: int) -> int:
    """Of the all-gather of labels, int32."""
    return batch * 4


def batch_norm_bytes(devices: int) -> int:
    """Of the all-gathers of each channel's mean and variance on every device.

    And of the reduce-scatters of their gradients.
    """
    return devices * 2 * BATCH_NORM_CHANNELS * FLOAT


def pair_bytes(batch: int, devices: int) -> float:
    """Memory of a device's rows of the pair matrix, in all their copies."""
    return PAIR_COPIES * FLOAT * LEARNERS * (batch / devices) * batch


def batch_norm_seconds(devices: int, machine: Machine) -> float:
    """Synchronised statistics: gathered a layer, their gradients summed, backward."""
    layer = batch_norm_bytes(devices) / BATCH_NORM_LAYERS
    return BATCH_NORM_LAYERS * all_reduce_seconds(layer, devices, machine)


def compute_seconds(
    batch: int, devices: int, machine: Machine, reached: float
) -> float:
    """The device's images through the model, and its rows of the pair matrix."""
    images = batch / devices / machine.images_per_second(reached)
    products = 2 * TRAINING * (batch / devices) * batch * EMBEDDING_DIM
    return images + products * machine.highest / (machine.peak * reached)


def communication_seconds(batch: int, devices: int, machine: Machine) -> float:
    """Gradients summed, embeddings and labels gathered; without batch norm."""
    return (
        all_reduce_seconds(gradient_bytes(), devices, machine)
        + all_reduce_seconds(embedding_bytes(batch), devices, machine)
        + all_reduce_seconds(label_bytes(batch), devices, machine) / 2
    )


def step_seconds(batch: int, devices: int, machine: Machine, reached: float) -> float:
    """One training step."""
    return compute_seconds(batch, devices, machine, reached) + communication_seconds(
        batch, devices, machine
    )


def efficiency(batch: int, devices: int, machine: Machine, reached: float) -> float:
    """Share of a step that the same images take alone, on devices without links."""
    images = batch / devices / machine.images_per_second(reached)
    return images / step_seconds(batch, devices, machine, reached)


def _digits(x: float) -> str:
    """Three digits, without an exponent; "-" where nothing is known."""
    if math.isnan(x):
        return "-"
    if x <= 0:
        return "0"
    return f"{x:,.{max(0, 2 - math.floor(math.log10(x)))}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def traffic_table() -> str:
    """What a device sends and holds, 64 images a device; in MB, of any machine."""
    rows = []
    for devices in DEVICES:
        batch = PER_DEVICE * devices
        sizes = (
            ring_all_reduce_bytes(gradient_bytes(), devices),
            ring_all_reduce_bytes(embedding_bytes(batch), devices),
            ring_all_reduce_bytes(label_bytes(batch), devices) / 2,
            ring_all_reduce_bytes(batch_norm_bytes(devices), devices),
            pair_bytes(batch, devices),
        )
        rows.append([devices, f"{batch:,}", *(_digits(size / 1e6) for size in sizes)])
    head = ("devices", "batch", "gradients", "embeddings", "labels", "batch norm")
    return _table((*head, "pair matrix (memory)"), rows)


def weak_table(machines: Sequence[Machine], reached: float) -> str:
    """Step in milliseconds and efficiency, 64 images a device."""
    return _table(
        ("devices", *(machine.name for machine in machines)),
        [
            [n, *(_cell(PER_DEVICE * n, n, machine, reached) for machine in machines)]
            for n in DEVICES
        ],
    )


def strong_table(machines: Sequence[Machine], reached: float) -> str:
    """Step in milliseconds and efficiency, a batch shared by ever more devices."""
    return _table(
        ("batch", "devices", *(machine.name for machine in machines)),
        [
            [f"{batch:,}", n, *(_cell(batch, n, m, reached) for m in machines)]
            for batch in BATCHES
            for n in (1, 8, 64, 256, 1024)
            if n <= batch
        ],
    )


def _cell(batch: int, devices: int, machine: Machine, reached: float) -> str:
    step = step_seconds(batch, devices, machine, reached)
    share = efficiency(batch, devices, machine, reached)
    return f"{_digits(1e3 * step)} ({share:.0%})"


def limits_table(machines: Sequence[Machine], reached: float) -> str:
    """Where something else than the model becomes the limit."""
    rows: list[tuple[str, Callable[[Machine, float], str]]] = [
        (
            "images/s of a device",
            lambda m, rate: _digits(rate),
        ),
        (
            "images/s that a host must decode",
            lambda m, rate: _digits(rate * m.host_devices),
        ),
        (
            "threads that decode, for each device",
            lambda m, rate: str(math.ceil(rate / DECODED_PER_THREAD)),
        ),
        (
            "images/s of 1,024 devices",
            lambda m, rate: _digits(
                PER_DEVICE * 1024 / step_seconds(PER_DEVICE * 1024, 1024, m, reached)
            ),
        ),
        (
            "images a device whose model takes as long as 256 devices' collectives",
            lambda m, rate: _digits(communication_seconds(256, 256, m) * rate),
        ),
        (
            "batch whose pair matrix fills 1/4 of memory, 64 images a device",
            lambda m, rate: _digits(
                m.memory / 4 / (PAIR_COPIES * FLOAT * LEARNERS * PER_DEVICE)
            ),
        ),
        (
            "batch whose pair matrix takes as long as the model",
            lambda m, rate: _digits(
                m.peak * reached / (2 * TRAINING * EMBEDDING_DIM * m.highest * rate)
            ),
        ),
        (
            "synchronised batch norm, ms a step, 8 devices",
            lambda m, rate: _digits(1e3 * batch_norm_seconds(8, m)),
        ),
        (
            "synchronised batch norm, ms a step, 1,024 devices",
            lambda m, rate: _digits(1e3 * batch_norm_seconds(1024, m)),
        ),
    ]
    return _table(
        ("", *(machine.name for machine in machines)),
        [
            [title, *(of(m, m.images_per_second(reached)) for m in machines)]
            for title, of in rows
        ],
    )


def report(machines: Sequence[Machine], reached: float) -> str:
    """All tables, as docs/scaling.md holds them."""
    return f"""\
### Sent by each device in a step, MB, 64 images a device

{traffic_table()}

### Predicted step, ms (efficiency), 64 images a device

{weak_table(machines, reached)}

### Predicted step, ms (efficiency), a fixed batch

{strong_table(machines, reached)}

### Predicted limits

{limits_table(machines, reached)}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--reached", type=float, default=1.0, help="share of the compiled step's speed"
    )
    parser.add_argument(
        "--measured",
        action="append",
        default=[],
        metavar="NAME=IMAGES_PER_SECOND",
        help="of one device in training, for example v5e=700",
    )
    given = parser.parse_args(arguments)
    machines = {machine.name: machine for machine in MACHINES}
    for name, _, rate in (text.partition("=") for text in given.measured):
        if name not in machines:
            parser.error(f"--measured: {name!r} is none of {', '.join(machines)}.")
        machines[name] = dataclasses.replace(machines[name], measured=float(rate))
    print(report(list(machines.values()), given.reached), end="")


if __name__ == "__main__":
    main()
