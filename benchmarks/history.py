"""The tables of docs/performance.md, from the measurements in history.jsonl.

    python benchmarks/train_step.py --json=benchmarks/history.jsonl
    python benchmarks/history.py

A line is one measurement: when, of which commit (null where nobody wrote it down), on
what, by which benchmark, and its figures. Commit a line of a quiet machine together
with the page that this prints.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

_FILE = pathlib.Path(__file__).with_name("history.jsonl")
# Names of figures, in the order of the page; other fields of a line are not shown.
_FIGURES = {
    "images/s": "{:,.4g} images/s",
    "to peer": "{:.2f} of the peer's",
    "share": "share {:.2f}",
    "seconds": "{:,.4g} s",
    "minutes": "{:.1f} minutes",
    "steps": "{:,} steps",
    "recall@1": "Recall@1 {:.3f}",
    "before": "before {}",  # a commit that changed what is measured
}

Measurement = dict[str, Any]


def read() -> list[Measurement]:
    """All measurements, the oldest first; those of a peer are in our own lines."""
    lines = map(json.loads, _FILE.read_text().splitlines())
    return [line for line in lines if line.get("method", "abe_jax") == "abe_jax"]


def what(line: Measurement) -> str:
    """What was measured, in words."""
    if "what" in line:
        return line["what"]
    model = f"{line['model']}, {line['size']} x {line['size']}, batch {line['batch']}"
    return model if line["dtype"] == "float32" else f"{model}, {line['dtype']}"


def newest(lines: Iterable[Measurement]) -> list[Measurement]:
    """The last line of each benchmark and work, in the order of the first."""
    found: dict[tuple[str, str], Measurement] = {}
    for line in lines:
        found[line["benchmark"], what(line)] = line
    return sorted(found.values(), key=lambda line: line["benchmark"])


def table(lines: Iterable[Measurement]) -> str:
    """Measurements as a table of Markdown."""
    titles = ("benchmark", "what", "figures", "date", "commit", "machine, JAX")
    rows = [titles, ("---",) * len(titles)]
    for line in lines:
        figures = [
            text.format(line[name]) for name, text in _FIGURES.items() if name in line
        ]
        machine = f"{line['device']}, {line['jax']}"
        where = (line["date"], line["commit"] or "", machine)
        rows.append((line["benchmark"], what(line), ", ".join(figures), *where))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page() -> str:
    """What docs/performance.md ends with."""
    lines = read()
    return (
        f"## Newest figures\n\n{table(newest(lines))}\n"
        f"## History\n\n{table(reversed(lines))}"
    )


if __name__ == "__main__":
    print(page(), end="")
