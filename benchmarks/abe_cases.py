"""ABE-M in several sizes, against the PyTorch peer; and what trains: for benchmarks."""

import argparse
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import model_sizes
import numpy as np
import side_by_side
from flax import nnx
from jax.sharding import Mesh

from abe_jax import host_memory, models, optimizer, parallel, train_step

EMBEDDING_DIM = 512


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: ABE-M^512.

    Attributes:
      learners: M.
      size: side of the images, pixels.
      batch: number of images.
      dtype: "float32" or "bfloat16", of the trunk's computation.
      rematerialize: whether ours computes blocks again, backward.
      trunk: "googlenet" (BVLC's) or "resnet50", which the peer has too.
      in_turn: whether ours runs G for one learner after another.
    """

    learners: int
    size: int
    batch: int
    dtype: str
    rematerialize: bool = False
    trunk: str = "googlenet"
    in_turn: bool = False

    def config(self) -> Any:
        """The default config, for this model and these images."""
        config = side_by_side.config("default")
        config.model.update(
            trunk=self.trunk,
            num_learners=self.learners,
            embedding_dim=EMBEDDING_DIM,
            dtype=self.dtype,
            rematerialize=self.rematerialize,
            learners_in_turn=self.in_turn,
        )
        config.data.image_size = self.size
        config.train.batch_size = self.batch
        return config

    def images(self) -> np.ndarray:
        """Random images, uint8 `[B, H, W, 3]`."""
        shape = (self.batch, self.size, self.size, 3)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def labels(self) -> np.ndarray:
        """Two images a class, int32 `[B]`."""
        return (np.arange(self.batch) // 2).astype(np.int32)

    def operations(self) -> float:
        """Multiplications and additions to embed the batch."""
        _, multiply_adds = model_sizes.size(
            "abe", self.learners, EMBEDDING_DIM, self.size, self.trunk
        )
        return 2.0 * multiply_adds * self.batch


def training(config: Any, mesh: Mesh) -> tuple[Callable[..., Any], Any]:
    """The step of `abe_jax.main` on a mesh's devices, and the first state."""
    model = models.create(config.model, rngs=nnx.Rngs(0))
    optimiser, learning_rate = optimizer.create(config.train)
    take_step = parallel.map_over_devices(
        train_step.make_train_step(model, optimiser, learning_rate, config),
        mesh,
        donate_state=True,
    )
    return take_step, train_step.initial_state(model, optimiser)


Maker = Callable[[Case], Callable[[int], None]]


def main(description: str, ours: Maker, peer: Maker, passes: int) -> None:
    """Runs the cases of the command line and shows a row for each method.

    Args:
      description: of the benchmark.
      ours: makes the function that does the work of a case so many times.
      peer: the same in PyTorch.
      passes: how many times the multiply-adds of an embedding the work takes.
    """
    host_memory.use_large_pages()  # as abe_jax.main does
    # Two frameworks share one GPU. JAX reads this when it first asks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--cases",
        default="224:64,224:256" if gpu else "64:32,224:16",
        help="side of the images and batch, as 64:32,224:16",
    )
    parser.add_argument("--trunk", default="googlenet", help="or resnet50")
    parser.add_argument("--learners", default="8", help="as 1,4,8")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--rematerialize", action="store_true", help="ours only")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn, about")
    parser.add_argument("--json", help="file to append the rows to")
    args = parser.parse_args()
    has_peer = importlib.util.find_spec("torch") is not None
    if not has_peer:
        print("the peer is left out: torch is not installed")
    rate = side_by_side.matrix_rate(jnp.dtype(args.dtype))
    print(f"matrix product: {rate / 1e9:,.0f} GFLOP/s ({args.dtype})", flush=True)
    rows = []
    for case in _cases(args):
        methods = [side_by_side.Method("abe_jax", ours(case))]
        if has_peer:
            methods.append(side_by_side.Method("PyTorch", peer(case)))
        side_by_side.take_turns(methods, turns=args.turns, seconds=args.seconds)
        operations = passes * case.operations()  # traces the model
        for method in methods:
            done = operations / method.seconds
            ratio = methods[-1].seconds / method.seconds
            rows.append(
                {
                    "method": method.name,
                    "model": f"ABE-{case.learners}{_suffix(case)}",
                    "size": case.size,
                    "batch": case.batch,
                    "dtype": case.dtype,
                    "images/s": case.batch / method.seconds,
                    **({"to peer": ratio} if has_peer else {}),
                    "GFLOP/s": done / 1e9,
                    "of matrix rate": done / rate,
                    "first call s": method.setup_seconds,
                    "peak MiB": method.peak_mib,
                }
            )
        print(f"{case}: {[m.turns for m in methods]}", flush=True)
    side_by_side.show(rows, args.json)


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    for count in args.learners.split(","):
        for pair in args.cases.split(","):
            size, batch = map(int, pair.split(":"))
            fields = (size, batch, args.dtype, args.rematerialize, args.trunk)
            yield Case(int(count), *fields)


def _suffix(case: Case) -> str:
    trunk = "" if case.trunk == "googlenet" else f" on {case.trunk}"
    return f"{trunk}, rematerialized" if case.rematerialize else trunk
