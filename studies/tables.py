"""Makes the tables of `docs/results.md` from the lines of `studies/runs.jsonl`.

    python -m studies.tables

A table stands between `<!-- runs DATA PART -->` and `<!-- end -->`: a row of the grid a
line, with mean and standard deviation of three seeds or more, or the values of two.
`<!-- losses DATA PART -->` has the training losses of the runs whose lines tell them,
`<!-- earlier -->` is the table of `studies/earlier.jsonl`, `<!-- limits -->` that of
`studies/limits.jsonl`. The rest of the page is written by hand.
"""

import collections
import operator
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from studies import grid, limits, run

PAGE = run.RUNS_FILE.parents[1] / "docs" / "results.md"

_BLOCK = re.compile(
    r"(<!-- (?:(runs|losses) (\w+) (\w+)|(earlier|limits)) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)


_Column = tuple[str, Callable[[dict], float | None], float, int]


def _diversity(name: str) -> Callable[[dict], float | None]:
    def of(line: dict) -> float | None:
        value = line["diversity"].get(name)
        return value["mean"] if isinstance(value, dict) else value

    return of


# Heading, what it is of a line, factor, decimals.
_COLUMNS: tuple[_Column, ...] = (
    ("ensemble R@1", lambda line: line["recall"]["1"], 100, 1),
    ("mean learner", lambda line: line["mean_learner"]["recall"]["1"], 100, 1),
    ("MAP@R", lambda line: line["map_at_r"], 100, 1),
    ("mean learner's", lambda line: line["mean_learner"]["map_at_r"], 100, 1),
    ("gain", _diversity("gain"), 100, 1),
    ("of errors", _diversity("gain_of_errors"), 100, 0),
    ("self cosine", _diversity("self_cosine"), 1, 2),
    ("similarities correlate", _diversity("similarity_correlation"), 1, 2),
    ("10 nearest in common", _diversity("neighbour_overlap"), 1, 2),
    ("positive cosine", _diversity("positive_cosine"), 1, 2),
)
_LIMITS: tuple[_Column, ...] = (
    ("classes trained on", operator.itemgetter("trained"), 100, 1),
    ("classes held out", operator.itemgetter("evaluated"), 100, 1),
    ("a fifth of those trained on", operator.itemgetter("trained_fifth"), 100, 1),
    ("a fifth of those held out", operator.itemgetter("evaluated_fifth"), 100, 1),
    ("wrong ones by the same artist", operator.itemgetter("wrong_same_artist"), 100, 0),
    ("of all images of other classes", operator.itemgetter("same_artist"), 100, 0),
)


def _loss(sixth: int) -> Callable[[dict], float | None]:
    return lambda line: line["losses"][sixth]


_LOSSES: tuple[_Column, ...] = tuple(
    (f"sixth {i + 1}", _loss(i), 1, 2) for i in range(6)
)


def table(
    lines: Sequence[dict],
    keys: Sequence[str] = ("row",),
    columns: Sequence[_Column] = _COLUMNS,
) -> str:
    """Markdown: a line for all seeds of a run, in the grid's order.

    Args:
      lines: of runs.
      keys: fields of a line that tell runs apart, "row" at the end; a column each.
      columns: what is told of them.
    """
    order = {
        "data": list(grid.DATA),
        "part": ["test", "validation"],
        "row": list(grid.ROWS),
    }
    runs = collections.defaultdict(list)
    for line in lines:
        runs[tuple(line[key] for key in keys)].append(line)

    def place(names: tuple[str, ...]) -> list[int]:
        return [order[key].index(n) for key, n in zip(keys, names, strict=True)]

    head = [*keys, "seeds", *(title for title, *_ in columns)]
    text = [head, ["---"] * len(head)]
    for names in sorted(runs, key=place):
        seeds = sorted(runs[names], key=lambda line: line["seed"])
        cells = [_cell([of(r) for r in seeds], f, d) for _, of, f, d in columns]
        text.append([*names, str(len(seeds)), *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in text)


def _cell(values: Sequence[float | None], factor: float, decimals: int) -> str:
    numbers = [factor * value for value in values if value is not None]
    if not numbers:
        return ""
    if len(numbers) < 3:
        return ", ".join(f"{number:.{decimals}f}" for number in numbers)
    mean, deviation = np.mean(numbers), np.std(numbers, ddof=1)
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"


def fill(
    page: str,
    lines: Sequence[dict],
    earlier: Sequence[dict] = (),
    limited: Sequence[dict] = (),
) -> str:
    """The page with its tables made anew."""

    def block(match: re.Match) -> str:
        head, kind, data, part, other, end = match.groups()
        if other == "earlier":
            return f"{head}{table(earlier, ('data', 'part', 'row'))}{end}"
        if other == "limits":
            return f"{head}{table(limited, ('data', 'row'), _LIMITS)}{end}"
        wanted = [x for x in lines if (x["data"], x["part"]) == (data, part)]
        if kind == "losses":
            told = [line for line in wanted if "losses" in line]
            return f"{head}{table(told, columns=_LOSSES)}{end}"
        return f"{head}{table(wanted)}{end}"

    return _BLOCK.sub(block, page)


def main(page: pathlib.Path = PAGE) -> None:
    """Rewrites the page in place."""
    files = (run.RUNS_FILE, run.EARLIER_FILE, limits.FILE)
    page.write_text(fill(page.read_text(), *map(run.read_lines, files)))


if __name__ == "__main__":
    main()
