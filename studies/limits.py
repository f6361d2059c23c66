"""What limits a trained run on emoji64: generalisation, the number of classes, style.

    python -m studies.limits --data=emoji64_tuned --path=emoji64 --part=test

Measures runs whose workdirs `studies.run` left, by embedding the images they were
trained on as well; a committed line of `studies/limits.jsonl` each.
"""

import pathlib
from typing import Any

import numpy as np
from absl import app

from abe_jax import data, evaluate, parallel, retrieval
from abe_jax.errors import UserError
from abe_jax.workdir import weights
from studies import grid, run

FILE = run.RUNS_FILE.with_name("limits.jsonl")
PARTS = 5  # of the classes: validation classes are a fifth of those trained on


def measure(config: Any, workdir: str) -> dict[str, float]:
    """What a run's model does where, each from 0 to 1.

    Args:
      config: of the run; its images' file names are those of their artists.
      workdir: holds a checkpoint of it.

    Returns:
      "trained", "evaluated": Recall@1 among the images of the classes trained on, and
      of those held out. "trained_fifth", "evaluated_fifth": the same among a fifth of
      these classes, the mean of all five. "wrong_same_artist": share of the wrong
      nearest neighbours that are by the query's artist; "same_artist": share of all
      images of other classes that are.
    """
    splits = data.create(config.data)
    mesh = parallel.make_mesh()
    model, state = weights.restore_trained(pathlib.Path(workdir), config, mesh, None)
    if state.step != config.train.steps:
        raise UserError(f"{workdir} is at step {state.step} of {config.train.steps}.")
    evaluator = evaluate.Evaluator(config, model, splits, mesh)
    found: dict[str, float] = {}
    for name, part in (("trained", splits.train), ("evaluated", splits.evaluation)):
        rows = evaluator.embed(state, part)
        found[name] = _recall(rows, part.labels)
        number = np.unique(part.labels, return_inverse=True)[1]
        fifths = [number % PARTS == i for i in range(PARTS)]
        found[f"{name}_fifth"] = float(
            np.mean([_recall(rows[fifth], part.labels[fifth]) for fifth in fifths])
        )
    return found | by_artist(rows, part)


def main(_) -> None:
    """A line for each run that the flags name."""
    folder = pathlib.Path(run.FOLDER.value)

    def line_of(data: str, row: str, seed: int, part: str) -> dict:
        key = data, row, seed, part
        if grid.ROWS[row].members > 1:
            raise app.UsageError(f"{row!r} is of several models; name a row of one.")
        found = measure(*run.config_and_workdir(*key, run.PATH.value, folder))
        return run.named(*key) | run.made_by() | found

    run.add_lines(line_of, FILE)


def _recall(rows: np.ndarray, labels: np.ndarray) -> float:
    return float(retrieval.recall_at_k(rows, labels, (1,))[1])


def by_artist(rows: np.ndarray, part: data.Subset) -> dict[str, float]:
    """The shares of `measure` that are of artists, of a part and its embeddings."""
    artists = np.array([pathlib.PurePath(name).stem for name in part.names])
    nearest = retrieval.top_k(rows, rows, 1, exclude_self=True)[1][:, 0]
    wrong = part.labels != part.labels[nearest]
    other = part.labels[:, None] != part.labels
    same = artists[:, None] == artists
    return {
        "wrong_same_artist": float(np.mean(same[np.arange(len(rows)), nearest][wrong])),
        "same_artist": float(np.mean(same[other])),
    }


if __name__ == "__main__":
    app.run(main)
