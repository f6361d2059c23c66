"""The figure of `docs/results.md`.

Left: the gain of each ensemble over its mean learner, against how good that learner
is, of all lines, those of earlier too, beside the paper's own. Right: Recall@1 by the
number of learners, at the quickstart's budget.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abe_jax.report.plots import COLOURS
from studies import run

FILE = run.RUNS_FILE.parents[1] / "docs" / "results.png"

# Cars-196, Recall@1 of the ensemble and of the mean learner (the paper's tables).
_PAPER = {
    "ABE": ((82.5, 74.4), (85.2, 75.0)),
    "ABE, no L_div": ((69.7, 69.5),),
    "M-heads": ((76.1, 68.3),),
}
_MARKERS = {"birds": "o", "emoji64": "s"}


def kind_of(row: str) -> str | None:
    """The curve that a row of the grid belongs to; None of one that has no ensemble."""
    if "x" in row.split() or "1-head" in row:
        return None
    if "heads" in row:
        return "M-heads"
    return "ABE, no L_div" if row == "lambda 0" else "ABE"


def recalls(lines: Sequence[dict]) -> np.ndarray:
    """Recall@1 in %, `[runs, 2]`: of the ensemble, of its mean learner."""
    pairs = [(x["recall"]["1"], x["mean_learner"]["recall"]["1"]) for x in lines]
    return 100 * np.array(pairs).reshape(-1, 2)


def by_learners(lines: Sequence[dict]) -> dict[str, dict[int, np.ndarray]]:
    """Of ABE and M-heads, by the number of learners: see `recalls`."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for kind, name in (("ABE", "abe-{}"), ("M-heads", "{}-heads")):
        for learners in (1, 2, 4, 8):
            of_row = [x for x in lines if x["row"] == name.format(learners)]
            if of_row:
                found.setdefault(kind, {})[learners] = recalls(of_row)
    return found


def draw(lines: Sequence[dict], earlier: Sequence[dict] = ()) -> Figure:
    """Both plots."""
    figure = Figure(figsize=(9, 4), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    _draw_gains(left, [*lines, *earlier])
    fast = [x for x in lines if (x["data"], x["part"]) == ("birds_fast", "test")]
    _draw_by_learners(right, by_learners(fast))
    return figure


def _draw_gains(axes: Axes, lines: Sequence[dict]) -> None:
    style: dict[str, Any]
    for colour, (kind, of_paper) in zip(COLOURS, _PAPER.items(), strict=False):
        for data, marker in _MARKERS.items():
            chosen = [
                x
                for x in lines
                if x["data"].split("_")[0] == data
                and kind_of(x["row"]) == kind
                and len(x["learners"]) > 1
            ]
            if chosen:
                both, mean = recalls(chosen).T
                style = {"s": 22, "marker": marker, "color": colour, "alpha": 0.7}
                axes.scatter(mean, both - mean, label=f"{kind}: {data}", **style)
        both, mean = np.array(of_paper).T
        style = {"s": 90, "marker": "*", "facecolor": "none", "edgecolor": colour}
        axes.scatter(mean, both - mean, label=f"{kind}: the paper's Cars-196", **style)
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    axes.set_xlabel("Recall@1 of the mean learner, %")
    axes.set_ylabel("gain of the ensemble, points")
    _legend_above(axes)


def _draw_by_learners(axes: Axes, found: dict[str, dict[int, np.ndarray]]) -> None:
    for colour, (kind, of_kind) in zip(COLOURS[::2], found.items(), strict=False):
        learners = sorted(of_kind)
        for column, (what, line) in enumerate((("ensemble", "-"), ("learner", "--"))):
            values = [of_kind[m][:, column] for m in learners]
            axes.errorbar(
                learners,
                [v.mean() for v in values],
                [v.std(ddof=1) if len(v) > 1 else 0 for v in values],
                label=f"{kind}, {what}",
                color=colour,
                linestyle=line,
                marker="o",
                capsize=3,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], labels=["1", "2", "4", "8"])
    axes.set_xlabel("learners (birds from random weights, test classes)")
    axes.set_ylabel("Recall@1, %")
    _legend_above(axes)


def _legend_above(axes: Axes) -> None:
    style: dict[str, Any] = {
        "frameon": False,
        "fontsize": 7,
        "ncols": 2,
        "borderaxespad": 0,
    }
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.02), **style)


def main(file: pathlib.Path = FILE) -> None:
    """Writes the figure."""
    draw(run.read_lines(), run.read_lines(run.EARLIER_FILE)).savefig(file)


if __name__ == "__main__":
    main()
