"""Plots as SVG text, in the page's own colours in light and in dark.

By matplotlib: its SVG is a few kilobytes of text without scripts. Libraries that draw
in the browser bring megabytes of JavaScript to every page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart in light and dark and by the colour-blind (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "osD^vP"

_INK = "#010203"  # becomes the colour of the page's text
_STYLE = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def curves(lines: Mapping[str, Sequence[tuple[int, float]]], label: str) -> str:
    """Lines over training steps, the last point marked.

    Args:
      lines: points (step, value) by name; empty ones are left out.
      label: of the vertical axis.
    """

    def draw(axes: Axes) -> None:
        for number, (name, points) in enumerate(lines.items()):
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(steps, values, color=colour, linewidth=1.6)
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot(steps[-1:], values[-1:], color=colour, marker=marker, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend()

    return _svg(draw, (6.6, 2.6), label)


def histograms(values: Mapping[str, np.ndarray]) -> str:
    """Shares of cosines in [-1, 1], as outlines in one plot.

    Args:
      values: cosines by name.
    """
    bins = np.linspace(-1, 1, 81)

    def draw(axes: Axes) -> None:
        styles = ("-", "--", ":")
        for number, (name, cosines) in enumerate(values.items()):
            # Of float32 rows, they may be a little beyond 1.
            counts, _ = np.histogram(np.clip(cosines, -1, 1), bins)
            axes.stairs(
                counts / max(len(cosines), 1),
                bins,
                color=COLOURS[number],
                linestyle=styles[number % 3],
                linewidth=1.8,
                label=name,
            )
        axes.set_xlabel("cosine")
        axes.set_ylabel("share of the pairs")
        axes.legend()

    return _svg(draw, (6.6, 2.8), "histograms")


def scatter(points: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str:
    """Points in the plane; those of named classes in colours and shapes.

    Args:
      points: `[n, 2]`.
      labels: `[n]`, index into `names`, or -1 for the others.
      names: of the classes that are told apart.
    """

    def draw(axes: Axes) -> None:
        others = labels < 0
        axes.scatter(*points[others].T, s=4, color="#999999", linewidths=0)
        for number, name in enumerate(names):
            axes.scatter(
                *points[labels == number].T,
                s=18,
                color=COLOURS[number % len(COLOURS)],
                marker=_MARKERS[(number // len(COLOURS) + number) % len(_MARKERS)],
                linewidths=0,
                label=f" {_short(name)}",  # matplotlib hides what begins with "_"
            )
        axes.set_xticks([])
        axes.set_yticks([])
        legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        for line in legend.get_texts():
            line.set_parse_math(False)  # a "$" in a name is no formula

    return _svg(draw, (7.4, 4.2), "map", right=2.4)


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _svg(
    draw: Callable[[Axes], None],
    size: tuple[float, float],
    salt: str,
    *,
    right: float = 0.1,
) -> str:
    # Here, as it takes half a second, and most that import this draw nothing.
    import matplotlib.style
    from matplotlib.figure import Figure

    # Margins in inches: matplotlib's own layouts draw everything twice to find them.
    (width, height), left, bottom, top = size, 0.9, 0.5, 0.2
    place = left, bottom, width - left - right, height - bottom - top
    # Ids that differ between plots of a page, and not between two runs.
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": salt}
    # Not on top of the user's own settings: with TeX, say, there may be no plot at all.
    own = matplotlib.style.context(("default", style))
    with own, warnings.catch_warnings():
        # Of letters that its font lacks: the browser has its own.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=size)
        axes = figure.add_axes(tuple(np.divide(place, (*size, *size))))
        axes.ticklabel_format(useOffset=False)
        draw(axes)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    # Ids that are not made from the salt would be the same in all plots of a page.
    prefix = re.sub(r"\W", "", salt)

    def fitted(tag: re.Match[str]) -> str:
        return (
            tag[0]
            .replace(_INK, "currentColor")
            .replace('id="', f'id="{prefix}-')
            .replace('="#', f'="#{prefix}-')
            .replace("url(#", f"url(#{prefix}-")
        )

    # Within tags only: between them stand names of classes.
    return re.sub(r"<[^>]*>", fitted, text[text.index("<svg") :])
