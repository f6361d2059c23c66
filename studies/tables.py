"""Makes the tables of `docs/results.md` from the lines of `studies/runs.jsonl`.

    python -m studies.tables

A table stands between `<!-- runs DATA PART -->` and `<!-- end -->`: a row of the grid a
line, with mean, standard deviation and number of seeds; `<!-- earlier DATA PART -->` is
of `studies/earlier.jsonl`. The rest of the page is written by hand.
"""

import collections
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from studies import grid, run

PAGE = run.RUNS_FILE.parents[1] / "docs" / "results.md"

_BLOCK = re.compile(
    r"(<!-- (runs|earlier) (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL
)


def _diversity(name: str) -> Callable[[dict], float | None]:
    def of(line: dict) -> float | None:
        value = line["diversity"].get(name)
        return value["mean"] if isinstance(value, dict) else value

    return of


# Heading, what it is of a line, factor, decimals.
_COLUMNS: tuple[tuple[str, Callable[[dict], float | None], float, int], ...] = (
    ("ensemble R@1", lambda line: line["recall"]["1"], 100, 1),
    ("mean learner", lambda line: line["mean_learner"]["recall"]["1"], 100, 1),
    ("gain", _diversity("gain"), 100, 1),
    ("of errors", _diversity("gain_of_errors"), 100, 0),
    ("self cosine", _diversity("self_cosine"), 1, 2),
    ("similarities correlate", _diversity("similarity_correlation"), 1, 2),
    ("10 nearest in common", _diversity("neighbour_overlap"), 1, 2),
    ("positive cosine", _diversity("positive_cosine"), 1, 2),
)


def table(lines: Sequence[dict]) -> str:
    """Markdown: a line for each row of the grid that has runs, in the grid's order."""
    by_row = collections.defaultdict(list)
    for line in lines:
        by_row[line["row"]].append(line)
    head = ["row", "seeds", *(title for title, *_ in _COLUMNS)]
    text = [head, ["---"] * len(head)]
    for row in grid.ROWS:
        if runs := by_row.get(row):
            cells = [_cell([of(r) for r in runs], f, d) for _, of, f, d in _COLUMNS]
            text.append([row, str(len(runs)), *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in text)


def _cell(values: Sequence[float | None], factor: float, decimals: int) -> str:
    numbers = [factor * value for value in values if value is not None]
    if not numbers:
        return ""
    mean = f"{np.mean(numbers):.{decimals}f}"
    if len(numbers) < 2:
        return mean
    return f"{mean} ± {np.std(numbers, ddof=1):.{decimals}f}"


def fill(page: str, lines: Sequence[dict], earlier: Sequence[dict] = ()) -> str:
    """The page with its tables made anew."""

    def block(match: re.Match) -> str:
        head, when, data, part, end = match.groups()
        found = lines if when == "runs" else earlier
        wanted = [x for x in found if (x["data"], x["part"]) == (data, part)]
        return f"{head}{table(wanted)}{end}"

    return _BLOCK.sub(block, page)


def main(page: pathlib.Path = PAGE) -> None:
    """Rewrites the page in place."""
    earlier = run.read_lines(run.EARLIER_FILE)
    page.write_text(fill(page.read_text(), run.read_lines(), earlier))


if __name__ == "__main__":
    main()
