"""Runs rows of the study, one committed line a run; start it again to go on.

    python -m studies.run --data=birds --rows=abe-4,1-head --seeds=0,1,2
    python -m studies.run --data=emoji64 --path=emoji64.zip --rows=abe-4 --part=test

A run goes through the same `train_and_evaluate` as everyone's. Its line in
`studies/runs.jsonl`, or `--lines`, holds what made it (row, seed, overrides, commit,
versions) and what it measured. A run whose line is there is not run again.
"""

import functools
import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
from absl import app, flags

from abe_jax import host_memory
from studies import grid

RUNS_FILE = pathlib.Path(__file__).with_name("runs.jsonl")
# Of ABE whose masks started at a part of Glorot's spread, until b246016.
EARLIER_FILE = RUNS_FILE.with_name("earlier.jsonl")

_DATA = flags.DEFINE_enum("data", "birds", list(grid.DATA), "Data set.")
_ROWS = flags.DEFINE_list("rows", ["abe-4"], "Rows of grid.ROWS.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
_PART = flags.DEFINE_enum(
    "part", "validation", ["validation", "test"], "Classes to evaluate on."
)
PATH = flags.DEFINE_string("path", None, "data.path, where the data set has one.")
FOLDER = flags.DEFINE_string("folder", "runs/study", "Where the workdirs go.")
_LINES = flags.DEFINE_string("lines", None, "File of lines, if not the committed one.")


def asked() -> Iterator[tuple[str, str, int, str]]:
    """Data, row, seed and part of each run that the flags name."""
    unknown = set(_ROWS.value) - grid.ROWS.keys()
    if unknown:
        raise app.UsageError(f"no row {sorted(unknown)}; there are {list(grid.ROWS)}")
    for seed in map(int, _SEEDS.value):
        for row in _ROWS.value:
            yield _DATA.value, row, seed, _PART.value


def done(
    data: str, row: str, seed: int, part: str, file: pathlib.Path | None = None
) -> bool:
    """Whether a run's line is there, by default in `runs.jsonl`."""
    wanted = named(data, row, seed, part)
    return any(wanted.items() <= line.items() for line in read_lines(file))


def named(data: str, row: str, seed: int, part: str) -> dict:
    """The fields of a line that tell its run."""
    return {"data": data, "row": row, "seed": seed, "part": part}


def read_lines(file: pathlib.Path | None = None) -> list[dict]:
    """All lines of a file, by default of `runs.jsonl`."""
    file = RUNS_FILE if file is None else file
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(
    data: str, row: str, seed: int, part: str, path: str | None, folder: pathlib.Path
) -> dict:
    """Trains and evaluates a row, or goes on with it; returns its line."""
    from abe_jax import train

    measured_by = made_by()  # the code that is there now
    start, pretrained = grid.DATA[data].start, None
    if start is not None:
        first = config_and_workdir(start, "1-head", seed, part, path, folder)
        train.train_and_evaluate(*first)  # at once, where it is there
        pretrained = first[1]
    began, members = time.perf_counter(), grid.ROWS[row].members
    runs = []
    for member in range(members):
        runs.append(config_and_workdir(data, row, seed, part, path, folder, member))
        runs[-1][0].model.pretrained = pretrained
        train.train_and_evaluate(*runs[-1])
    config, workdir = runs[0]
    if members == 1:
        measured = _measured(workdir) | {"losses": losses(workdir, config.train.steps)}
    else:
        measured = _measured_together(runs)
    return {
        **named(data, row, seed, part),
        "overrides": grid.DATA[data].overrides | grid.ROWS[row].overrides,
        "steps": config.train.steps,
        "seconds": round(time.perf_counter() - began),
        **measured_by,
        **{k: v for k, v in measured.items() if k != "step"},
    }


def made_by() -> dict[str, str]:
    """The commit, date and versions, of a line."""
    return {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
    }


def add_lines(line_of: Callable[..., dict], file: pathlib.Path) -> None:
    """Adds the line of each run that the flags name and that is not there.

    Args:
      line_of: gives it, of the run's data, row, seed and part.
      file: of lines, where `--lines` names no other.
    """
    file = pathlib.Path(_LINES.value or file)
    for key in asked():
        if done(*key, file):
            print(f"{key} has its line in {file.name}")
            continue
        line = line_of(*key)
        with file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")


def config_and_workdir(
    data: str,
    row: str,
    seed: int,
    part: str,
    path: str | None,
    folder: pathlib.Path,
    member: int = 0,
) -> tuple[Any, str]:
    """The config of a run, or of one of its members, and where it trains."""
    config = grid.config_of(data, row, seed + 1000 * member, part, path)
    config.model.embedding_dim //= grid.ROWS[row].members
    name = f"{data}-{row}-{seed}-{part}-{member}".replace(" ", "_")
    return config, str(folder / name)


def losses(workdir: str, steps: int) -> list[float]:
    """The mean of the logged training losses in each sixth of a run's steps."""
    lines = read_lines(pathlib.Path(workdir) / "metrics.jsonl")
    loss = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    step, value = np.array(list(loss)), np.array(list(loss.values()))
    sixth = np.ceil(6 * step / steps)
    return [float(np.mean(value[sixth == i])) for i in np.unique(sixth)]


def _measured(workdir: str) -> dict:
    evaluation = json.loads((pathlib.Path(workdir) / "evaluation.json").read_text())
    return {k: v for k, v in evaluation.items() if k != "protocol"}


def _measured_together(runs: list[tuple[Any, str]]) -> dict:
    """The members' embeddings concatenated, as if they were one model's learners."""
    from abe_jax import evaluate

    evaluations = [evaluate.measure_checkpoint(*run) for run in runs]
    together = np.concatenate([e.embeddings for e in evaluations], axis=1)
    labels = evaluations[0].queries.labels
    return evaluate.measure(together, labels, runs[0][0].eval.recall_at)


def _commit() -> str:
    """Of the code that is there now; "-dirty" if files other than the lines' differ."""
    changed = _output(
        *("git", "status", "--porcelain", "-uno", "--", ":/"),
        ":(top,exclude)studies/*.jsonl",
    )
    return _output("git", "rev-parse", "--short", "HEAD") + "-dirty" * bool(changed)


def _output(*command: str) -> str:
    folder = pathlib.Path(__file__).parent
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def main(_) -> None:
    host_memory.use_large_pages()  # as abe_jax.main does
    own = {"path": PATH.value, "folder": pathlib.Path(FOLDER.value)}
    add_lines(functools.partial(run, **own), RUNS_FILE)


if __name__ == "__main__":
    app.run(main)
