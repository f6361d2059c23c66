"""The whole loop of `abe_jax.main` against its bare step, in turns in one run.

    python benchmarks/train_loop.py
    python benchmarks/train_loop.py --config=emoji64 --path=emoji64.zip

The loop reads and decodes batches, takes steps and logs; its rate is the one that it
logs, without start, evaluations and checkpoints. The bare step takes the same batch
again and again. Where devices compute on the host's own cores, as on a CPU, the reading
of batches takes time from the steps. Generated birds are drawn when they are first
asked for; here they are so few that nearly all are before the lines that count.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from typing import Any

import abe_cases
import jax
import numpy as np
import side_by_side

from abe_jax import host_memory, parallel, train
from abe_jax.workdir import metrics as metric_writer


def loop_rates(config: Any) -> list[float]:
    """Images per second of each log line but the first two, of a new run."""
    with tempfile.TemporaryDirectory() as folder:
        train.train_and_evaluate(config, folder)
        lines = metric_writer.read(pathlib.Path(folder))
    rates = [m["train/images_per_second"] for m in lines if "train/loss" in m]
    return rates[2:]  # the first step, and the lines until the pipeline is full


def step_rates(config: Any, windows: int) -> list[float]:
    """Images per second of the step alone, in windows as long as a log line's."""
    mesh = parallel.make_mesh()
    take_step, state = abe_cases.training(config, mesh)
    state = parallel.replicate(state, mesh)
    count, side = config.train.batch_size, config.data.load_size
    rng = np.random.default_rng(0)
    rows = {
        "image": rng.integers(0, 256, (count, side, side, 3), np.uint8),
        "label": (np.arange(count) // 2).astype(np.int32),
    }
    batch = parallel.split_rows(rows, mesh)
    rates = []
    for _ in range(windows + 1):
        start = time.perf_counter()
        for _ in range(config.train.log_every):
            state, _ = take_step(state, batch)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        rates.append(config.train.log_every * count / seconds)
    return rates[1:]  # without compilation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--path", help="config.data.path")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4, help="log lines of a turn")
    parser.add_argument("--json", help="file to append the whole loop to")
    args = parser.parse_args()
    host_memory.use_large_pages()  # as abe_jax.main does
    config = side_by_side.config(args.config)
    if args.path:
        config.data.path = args.path
    # Few: of their 512 to train on, one or two are new to the lines that count.
    config.data.birds_images_per_class = 4
    config.train.steps = (args.windows + 1) * config.train.log_every
    config.train.eval_every = config.train.checkpoint_every = config.train.steps
    rates: dict[str, list[float]] = {"bare step": [], "whole loop": []}
    for _ in range(args.turns):
        rates["bare step"] += step_rates(config, args.windows)
        rates["whole loop"] += loop_rates(config)
    bare = statistics.median(rates["bare step"])
    rows = [
        {
            "what": name,
            "images/s": (now := statistics.median(seen)),
            "share": now / bare,
        }
        for name, seen in rates.items()
    ]
    kept = [{**rows[-1], "what": "loop to bare step"}]
    side_by_side.show(rows, args.json, kept)


if __name__ == "__main__":
    main()
