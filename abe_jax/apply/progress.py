"""What someone at a terminal sees while images are embedded."""

import sys
from collections.abc import Iterable

import tqdm

from abe_jax import command_line
from abe_jax.apply.images import ImageFile


def bar(files: list[ImageFile]) -> Iterable[ImageFile]:
    """The files, with their number, rate and time left on standard error."""
    watched = sys.stderr.isatty()
    return tqdm.tqdm(
        files,
        unit=" images",
        dynamic_ncols=True,
        mininterval=0.1 if watched else 20,  # seconds; few lines in a log
        delay=1,
        disable=command_line.is_quiet(),
        leave=watched,
    )


def list_refused(reasons: Iterable[object]) -> None:
    """Lists images that could not be read on standard error."""
    reasons = list(reasons)
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)
    if reasons:
        print(f"{len(reasons)} file(s) could not be read.", file=sys.stderr)
