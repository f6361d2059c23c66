"""Trains and evaluates retrieval embeddings: ABE in JAX and Flax.

python -m abe_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import dataclasses
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from abe_jax import command_line, host_memory, interrupts
from abe_jax.errors import UserError
from abe_jax.workdir import config_files


@dataclasses.dataclass(frozen=True)
class _Mode:
    """What --mode does.

    Attributes:
      what: for --help.
      function: "module:name", imported when it is called, so that --help needs no JAX;
        takes the config, the workdir and the values of `takes` by their names.
      takes: names of flags beside --config and --workdir.
      needs: those of them that must be given.
      one_process: the mode is for one process, on all its devices.
    """

    what: str
    function: str
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    one_process: bool = False


_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File in configs/, or its bare name; by default that of the run in --workdir. "
    "--config.SECTION.FIELD=VALUE overrides.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: config, metrics, checkpoints, report."
)
flags.DEFINE_integer(
    "step", None, "Step of the checkpoint to use; the newest by default."
)
flags.DEFINE_string("images", None, "Folder (of any depth), zip file or image.")
flags.DEFINE_string("output", None, "File to write; its suffix says in which form.")
flags.DEFINE_boolean("strict", False, "Stop at an image that cannot be read.")
flags.DEFINE_string("query", None, "Image, folder or zip file to look for.")
flags.DEFINE_integer("top_k", 10, "How many matches a query gets.")
flags.DEFINE_boolean("approximate", False, "Search by usearch, for millions of images.")
flags.DEFINE_integer(
    "learner", None, "Compare by this learner only; by default by all."
)

# The config of a mode is the run's own, unless --config names one; new runs need one.
_MODES = {
    "train": _Mode(
        "train, or go on where --workdir ends; evaluates on the way",
        "abe_jax.train:train_and_evaluate",
    ),
    "dry_run": _Mode(
        "print what training would take: parameters, batches, memory, time",
        "abe_jax.train.forecast:show_forecast",
    ),
    "evaluate": _Mode(
        "restore a checkpoint, print its table, write result and report",
        "abe_jax.report:evaluate_and_report",
        takes=("step",),
    ),
    "embed": _Mode(
        "write the embeddings of --images to --output: .npz or .parquet",
        "abe_jax.apply.embed:embed_images",
        takes=("images", "output", "strict", "step"),
        needs=("images", "output"),
        one_process=True,
    ),
    "search": _Mode(
        "find what is like --query in --images; prints it, writes search.html",
        "abe_jax.apply.search:search_images",
        takes=("images", "query", "top_k", "learner", "approximate", "step"),
        needs=("images", "query"),
        one_process=True,
    ),
    "export": _Mode(
        "write the model to --output: .safetensors, .onnx or .stablehlo",
        "abe_jax.apply.export:export_model",
        takes=("output", "step"),
        needs=("output",),
        one_process=True,
    ),
    "report": _Mode(
        "embed the data again and write report.html anew",
        "abe_jax.report:remake",
        takes=("step",),
    ),
}

_FOR_NEW_RUNS = ("train", "dry_run")

_MODE = flags.DEFINE_enum("mode", "train", list(_MODES), "What to do, one of:")
_QUIET = flags.DEFINE_boolean(
    "quiet", False, "Show results and errors only, no progress."
)
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "One process of several, as the cluster's environment says."
)
_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "One process of several: HOST:PORT of process 0."
)
_COUNT = flags.DEFINE_integer(
    "num_processes", None, "One process of several: their number."
)
_INDEX = flags.DEFINE_integer(
    "process_id", None, "One process of several: which this one is, from 0."
)
_OF_MODES = tuple(dict.fromkeys(name for m in _MODES.values() for name in m.takes))
_FLAGS = (
    *("config", "workdir", "mode", *_OF_MODES, "quiet"),
    *("distributed", "coordinator_address", "num_processes", "process_id"),
)


def _main(argv: Sequence[str]) -> None:
    command_line.refuse_arguments(argv)
    mode = _MODES[_MODE.value]
    for name in (_WORKDIR.name, *mode.needs):
        _require(name, flags.FLAGS[name].value)
    for name in _OF_MODES:
        if flags.FLAGS[name].present and name not in mode.takes:
            raise UserError(f"--{name} is not for --mode={_MODE.value}.")
    _require_one_process(mode, _COUNT.value)
    config_files.require_known(_CONFIG.value)
    # Orbax and JAX tell much that is not for the user of this program.
    logging.getLogger("absl").setLevel(logging.WARNING)
    logging.getLogger("absl").addFilter(command_line.without_traceback)
    logging.getLogger("jax").setLevel(logging.WARNING)
    if _QUIET.value:
        command_line.be_quiet()
    with interrupts.held_back():
        from abe_jax import processes  # not above: --help needs no JAX

    processes.check_compiler_flags()
    if _several_processes():
        processes.join(_ADDRESS.value, _COUNT.value, _INDEX.value)
        _require_one_process(mode, processes.place()[1])
    devices = processes.describe_devices()
    if processes.is_first() and not _QUIET.value:
        command_line.print_line(f"{_MODE.value} on {devices}")
    module, function_name = mode.function.split(":")
    function = getattr(importlib.import_module(module), function_name)
    values = {name: flags.FLAGS[name].value for name in mode.takes}
    try:
        function(_CONFIG.value, _WORKDIR.value, **values)
    except interrupts.Interrupted as interrupted:
        command_line.print_line(interrupted)
        _forget(interrupted)
        sys.exit(128 + interrupted.signal_number)


def _with_config_first(argv: Sequence[str]) -> list[str]:
    """The command line with --config, where its overrides need it: before them all."""
    name, rest = command_line.take(argv, _CONFIG.name)
    if name is not None:
        path = config_files.find(name)
    else:
        mode, _ = command_line.take(rest, _MODE.name)
        workdir, _ = command_line.take(rest, _WORKDIR.name)
        _require(_WORKDIR.name, workdir)
        assert workdir is not None
        if mode in (None, *_FOR_NEW_RUNS) and not config_files.holds_run(workdir):
            raise UserError(f"--config is required: {workdir} holds no run to resume.")
        path = f"{config_files.__file__}:{workdir}"
    return [rest[0], f"--{_CONFIG.name}={path}", *rest[1:]]


def _require(name: str, value: object) -> None:
    if value is None:
        raise UserError(f"--{name} is required; see --help.")


def _require_one_process(mode: _Mode, count: int | None) -> None:
    if mode.one_process and (count or 1) > 1:
        raise UserError(f"--mode={_MODE.value} is for one process, on all its devices.")


def _several_processes() -> bool:
    parts = (_ADDRESS.value, _COUNT.value, _INDEX.value)
    return _DISTRIBUTED.value or any(part is not None for part in parts)


def _guarded_main(argv: Sequence[str]) -> None:
    try:
        _main(argv)
        sys.stdout.flush()  # here, where BrokenPipeError is handled
    except UserError as error:
        _fail(error, 1)
    except KeyboardInterrupt as interrupt:
        _forget(interrupt)
        trains = _MODE.value == "train"
        lost = "; what was done since the last checkpoint is lost" if trains else ""
        _fail(UserError(f"stopped at once{lost}."), 128 + signal.SIGINT)
    except BrokenPipeError:  # of `| head`, to which no more need be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        from abe_jax import processes

        known = processes.explain(error)
        if known is not None:
            _forget(error)
            _fail(known, 1)
        if not _several_processes():
            raise
        traceback.print_exc()
        _forget(error)
        _leave(1)


def _forget(error: BaseException | None) -> None:
    """Frees what the error's frames hold, such as memory shared with workers."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    if "abe_jax.data" in sys.modules:
        from abe_jax.data import pipeline

        pipeline.wait_until_memory_is_freed()


def _fail(error: UserError, status: int) -> NoReturn:
    command_line.print_line(error)
    _forget(error)
    if _several_processes():
        _leave(status)
    sys.exit(status)


def _leave(status: int) -> NoReturn:
    # Python's own way out would wait for the other processes, who wait for this one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _help() -> str:
    lines = [__doc__ or "", "Flags:"]
    for name in _FLAGS:
        lines.append(f"  --{name:<21}{flags.FLAGS[name].help}")
        if name == _MODE.name:
            lines += [f"      {key:<19}{mode.what}" for key, mode in _MODES.items()]
    lines += ["", "Every field of a config is explained in configs/default.py."]
    return "\n".join(lines)


def _keep_compiled_programs() -> None:
    """Sets JAX's cache folder unless the user did: a second start compiles nothing."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "abe_jax", "compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    # By default JAX keeps only what took a second or more.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def run() -> None:
    """Entry point of `abe-jax` and of `python -m abe_jax.main`."""
    host_memory.use_large_pages()
    _keep_compiled_programs()
    config_files.make_importable()
    interrupts.wait_for_their_moment()
    app.run(
        _guarded_main,
        flags_parser=lambda argv: command_line.parse_flags(
            argv, _help, _with_config_first
        ),
    )


if __name__ == "__main__":
    run()
