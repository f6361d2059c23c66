"""Trains and evaluates retrieval embeddings from the command line.

    python -m abe_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from abe_jax.errors import UserError

_MODES = {
    "train": "train, or go on where --workdir ends; evaluates on the way",
    "evaluate": "restore a checkpoint, print the table, write evaluation.json",
}

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File in configs/; --config.FIELD=VALUE overrides.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    list(_MODES),
    "What to do. " + " ".join(f"{k}: {v}." for k, v in _MODES.items()),
)
_STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint to evaluate; the newest by default.", lower_bound=0
)


def _main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; flags start with --.")
    for flag in (_CONFIG, _WORKDIR):
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing; see --help.")
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells a lot
    # Only now: --help and mistakes in flags need no JAX.
    from abe_jax import evaluate, train

    if _MODE.value == "train":
        train.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    else:
        result = evaluate.evaluate_checkpoint(
            _CONFIG.value, _WORKDIR.value, _STEP.value
        )
        columns = {f"step {result['step']}": evaluate.scalars(result)}
        print(evaluate.table(columns, len(result["learners"])))


def run() -> None:
    """Entry point of `abe-jax` and of `python -m abe_jax.main`."""
    sys.path.insert(0, os.getcwd())  # configs import each other as `configs.NAME`
    app.run(_main)


if __name__ == "__main__":
    run()
