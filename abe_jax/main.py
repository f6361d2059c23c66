"""Trains and evaluates retrieval embeddings: ABE in JAX and Flax.

python -m abe_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from abe_jax import command_line, host_memory
from abe_jax.errors import UserError

_MODES = {
    "train": "train, or go on where --workdir ends; evaluates on the way",
    "evaluate": "restore a checkpoint, print its table, write result and report",
}

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File in configs/; --config.SECTION.FIELD=VALUE overrides a field.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: config, metrics, checkpoints, report."
)
_MODE = flags.DEFINE_enum("mode", "train", list(_MODES), "What to do, one of:")
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint to evaluate; the newest by default."
)
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "One process of several, as the cluster's environment says."
)
_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "One process of several: HOST:PORT of process 0,"
)
_COUNT = flags.DEFINE_integer("num_processes", None, "their number,")
_INDEX = flags.DEFINE_integer("process_id", None, "and which this one is, from 0.")
_FLAGS = (_CONFIG, _WORKDIR, _MODE, _STEP, _DISTRIBUTED, _ADDRESS, _COUNT, _INDEX)


def _main(argv: Sequence[str]) -> None:
    command_line.refuse_arguments(argv)
    for name in (_CONFIG.name, _WORKDIR.name):
        if not flags.FLAGS[name].present:
            raise UserError(f"--{name} is missing; --help tells more.")
    path = config_flags.get_config_filename(flags.FLAGS[_CONFIG.name])
    if not os.path.exists(path):
        raise UserError(f"--config: there is no file {path!r}.")
    # Orbax and JAX tell much that is not for the user of this program.
    logging.getLogger("absl").setLevel(logging.WARNING)
    logging.getLogger("jax").setLevel(logging.WARNING)
    from abe_jax import evaluate, processes, train  # not above: --help needs no JAX

    config, workdir = _CONFIG.value, str(_WORKDIR.value)
    if _several_processes():
        processes.join(_ADDRESS.value, _COUNT.value, _INDEX.value)
    try:
        if _MODE.value == "train":
            train.train_and_evaluate(config, workdir)
        else:
            evaluate.evaluate_checkpoint(config, workdir, _STEP.value)
    except train.Interrupted as interrupted:
        command_line.tell(interrupted)
        sys.exit(128 + interrupted.signal_number)


def _several_processes() -> bool:
    parts = (_ADDRESS.value, _COUNT.value, _INDEX.value)
    return _DISTRIBUTED.value or any(part is not None for part in parts)


def _guarded_main(argv: Sequence[str]) -> None:
    try:
        _main(argv)
    except UserError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        lost = "stopped at once; what was done since the last checkpoint is lost."
        _fail(UserError(lost), 128 + signal.SIGINT)
    except RuntimeError as error:  # JAX's own, such as a collective's
        if not _several_processes():
            raise
        reason = str(error).strip().splitlines()[0]
        ended = (
            "another process of this run ended, or the network failed; start all of "
            f"them again to go on from the newest checkpoint ({reason})."
        )
        _fail(UserError(ended), 1)


def _fail(error: UserError, status: int) -> NoReturn:
    command_line.tell(error)
    if _several_processes():
        # Python's own way out would wait for the others, who wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _help() -> str:
    lines = [__doc__ or "", "Flags:"]
    for flag in _FLAGS:
        lines.append(f"  --{flag.name:<21}{flags.FLAGS[flag.name].help}")
        if flag is _MODE:
            lines += [f"      {name:<19}{what}" for name, what in _MODES.items()]
    lines += ["", "Every field of a config is explained in configs/default.py."]
    return "\n".join(lines)


def _keep_compiled_programs() -> None:
    """Names a folder for them, unless the user did: a second start compiles nothing."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "abe_jax", "compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    # By default JAX keeps only what took a second or more.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def run() -> None:
    """Entry point of `abe-jax` and of `python -m abe_jax.main`."""
    host_memory.keep_freed_memory()
    _keep_compiled_programs()
    sys.path.insert(0, os.getcwd())  # configs import each other as `configs.NAME`
    app.run(
        _guarded_main,
        flags_parser=lambda argv: command_line.parse_flags(argv, _help),
    )


if __name__ == "__main__":
    run()
