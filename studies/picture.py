"""The README's picture: queries, and what the quickstart's model finds for them.

    python -m studies.picture runs/quickstart

A query to the left of its nearest images: green frames for its class, red for others.
"""

from collections.abc import Sequence
from typing import Any

from absl import app
from PIL import Image, ImageOps

from abe_jax import data, evaluate
from abe_jax.report import findings
from abe_jax.workdir import config_files
from studies import run

FILE = run.RUNS_FILE.parents[1] / "docs" / "quickstart.png"

_SIDE, _FRAME, _GAP = 128, 5, 4  # pixels
_FOUND = 7
_ASKED, _RIGHT, _WRONG = "#5a5a5a", "#2ca02c", "#d62728"


def draw(evaluation: evaluate.Evaluation, images: data.Subset) -> Image.Image:
    """Four queries spread evenly over all, and the hardest failure.

    Args:
      evaluation: of a model, whose queries are each other's gallery.
      images: the queries, as uint8 `[size, size, 3]` of any size.
    """
    found = findings.nearest(evaluation, _FOUND)
    even = data.evenly(len(images), 9)[1::2]
    queries = [*even.tolist(), *found.hardest()[:1].tolist()]
    step = _SIDE + 2 * _FRAME + _GAP
    size = (_FOUND + 1) * step + 5 * _GAP, len(queries) * step - _GAP
    picture = Image.new("RGB", size, "white")

    def paste(image: int, colour: str, column: int, line: int) -> None:
        shot = Image.fromarray(images[image]).resize((_SIDE, _SIDE))
        left = column * step + (6 * _GAP if column else 0)
        picture.paste(ImageOps.expand(shot, _FRAME, colour), (left, line * step))

    labels = images.labels
    for line, query in enumerate(queries):
        paste(query, _ASKED, 0, line)
        for column, row in enumerate(found.rows[query].tolist(), start=1):
            right = labels[row] == labels[query]
            paste(row, _RIGHT if right else _WRONG, column, line)
    return picture


def main(argv: Sequence[str]) -> None:
    """Writes the picture of a run, in 96 colours."""
    workdir = argv[1] if len(argv) > 1 else "runs/quickstart"
    config: Any = config_files.of_workdir(workdir)
    evaluation = evaluate.measure_checkpoint(config, workdir)
    config.data.update(load_size=_SIDE, image_size=_SIDE)  # drawn larger
    images = data.create(config.data).evaluation
    draw(evaluation, images).quantize(96).save(FILE, optimize=True)


if __name__ == "__main__":
    app.run(main)
