"""The figure of `docs/results.md`.

Left: the gain of each ensemble over its mean learner, against how good that learner
is, of all lines of test classes, beside the paper's own. Then Recall@1 by the number of
learners, from trained weights and from random ones.
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
    "ABE": ((76.8, 70.9), (82.5, 74.4), (81.8, 72.3), (85.2, 75.0)),
    "ABE, no L_div": ((69.7, 69.5),),
    "M-heads": ((73.3, 70.2), (76.6, 70.4), (76.1, 68.3)),
}
_MARKERS = {"birds": "o", "emoji64": "s"}
_BY_LEARNERS = {
    "emoji64_tuned": "emoji64, from trained weights",
    "birds_fast": "birds, from random weights",
}


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
    names = {"ABE": ("abe-1", "abe-{}"), "M-heads": ("1-head", "{}-heads")}
    for kind, (alone, several) in names.items():
        for learners in (1, 2, 4, 8):
            row = several.format(learners) if learners > 1 else alone
            of_row = [x for x in lines if x["row"] == row]
            if of_row:
                found.setdefault(kind, {})[learners] = recalls(of_row)
    return found


def draw(lines: Sequence[dict]) -> Figure:
    """All plots, of the lines of test classes."""
    figure = Figure(figsize=(13, 4), layout="constrained", dpi=110)
    plots = figure.subplots(1, 1 + len(_BY_LEARNERS))
    for axes in plots:
        axes.spines[["top", "right"]].set_visible(False)
    tested = [line for line in lines if line["part"] == "test"]
    _draw_gains(plots[0], tested)
    for axes, (data, title) in zip(plots[1:], _BY_LEARNERS.items(), strict=True):
        found = by_learners([line for line in tested if line["data"] == data])
        _draw_by_learners(axes, found, title)
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


def _draw_by_learners(
    axes: Axes, found: dict[str, dict[int, np.ndarray]], title: str
) -> None:
    for colour, (kind, of_kind) in zip(COLOURS[::2], found.items(), strict=False):
        learners = sorted(of_kind)
        for column, (what, line) in enumerate((("ensemble", "-"), ("learner", "--"))):
            values = [of_kind[m][:, column] for m in learners]
            axes.errorbar(
                learners,
                [v.mean() for v in values],
                [v.std(ddof=1) if len(v) > 2 else 0 for v in values],
                label=f"{kind}, {what}",
                color=colour,
                linestyle=line,
                marker="o",
                capsize=3,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], labels=["1", "2", "4", "8"])
    axes.set_xlabel(f"learners ({title})")
    axes.set_ylabel("Recall@1, %")
    if found:
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
    draw(run.read_lines()).savefig(file)


if __name__ == "__main__":
    main()
