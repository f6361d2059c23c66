"""An evaluation as flat metrics, as a table, and as the file of a run."""

import json
import pathlib

from abe_jax import workdir
from abe_jax.evaluate.measure import METRICS


def scalars(evaluation: dict) -> dict[str, float]:
    """An evaluation as flat metrics.

    `eval/recall@1`, `eval/learner_0/map_at_r`, `eval/diversity/self_cosine/mean`, ...
    """
    parts = {"eval": evaluation, "eval/mean_learner": evaluation["mean_learner"]}
    for number, learner in enumerate(evaluation["learners"]):
        parts[f"eval/learner_{number}"] = learner
    metrics = {}
    for prefix, part in parts.items():
        for name in METRICS:
            metrics |= _flat(f"{prefix}/{name}", part[name], "@")
    return metrics | _flat("eval/diversity", evaluation["diversity"], "/")


def _flat(name: str, value: dict | float, separator: str) -> dict[str, float]:
    if not isinstance(value, dict):
        return {name: value}
    flat = {}
    for key, inner in value.items():
        flat |= _flat(f"{name}{separator}{key}", inner, separator)
    return flat


def show(evaluation: dict) -> None:
    """Prints the table of one evaluation, the content of `evaluation.json`."""
    columns = {f"step {evaluation['step']}": scalars(evaluation)}
    print(table(columns, len(evaluation["learners"])), flush=True)


def table(columns: dict[str, dict[str, float]], num_learners: int) -> str:
    """A table of all metrics, a row for each learner and the ensemble.

    Args:
      columns: title to flat metrics (see `scalars`): {"untrained": ..., ...}.
      num_learners: M.

    Returns:
      lines of plain text; the last says what the ensemble gains, where it can.
    """
    rows = {f"learner {m}": f"eval/learner_{m}/" for m in range(num_learners)}
    rows |= {"mean learner": "eval/mean_learner/", "ensemble": "eval/"}
    newest = list(columns.values())[-1]
    titles = {}
    for name in newest:
        base, _, k = name.removeprefix("eval/").partition("@")
        if base in METRICS:
            titles[name.removeprefix("eval/")] = METRICS[base].title.format(k=k)
    lines = [
        " " * 12 + "".join(f"{title:>{8 * len(titles)}}" for title in columns),
        " " * 12 + "".join(f"{shown:>8}" for _ in columns for shown in titles.values()),
    ]
    for row, prefix in rows.items():
        cells = (metrics[prefix + n] for metrics in columns.values() for n in titles)
        lines.append(f"{row:<12}" + "".join(f"{cell:>8.3f}" for cell in cells))
    if num_learners > 1:
        lines += ["", _gain(newest)]
    return "\n".join(lines)


def _gain(metrics: dict[str, float]) -> str:
    """One line: what the ensemble gains, and how alike its learners are."""

    def of(name: str) -> float:
        return metrics[f"eval/diversity/{name}"]

    return (
        f"The ensemble gains {100 * of('gain'):+.1f} points of R@1 over its mean "
        f"learner, {of('gain_of_errors'):.0%} of its errors. Two learners: cosine "
        f"{of('self_cosine/mean'):.2f}, similarities correlate "
        f"{of('similarity_correlation'):.2f}, both wrong {of('shared_errors'):.3f} "
        f"(independent: {of('shared_errors_if_independent'):.3f})."
    )


def write(folder: pathlib.Path, content: dict) -> None:
    """Writes `evaluation.json` into the folder of a run, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    workdir.write_whole(folder / workdir.EVALUATION_FILE, text)
