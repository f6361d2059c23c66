"""Where a result goes."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

from abe_jax.data.datasets.tree import printable
from abe_jax.errors import UserError
from abe_jax.workdir import whole

_Form = TypeVar("_Form")


def by_suffix(path: pathlib.Path, forms: Mapping[str, _Form]) -> _Form:
    """Checks, before hours of work, that `--output` can be written; returns its form.

    Args:
      path: of the file.
      forms: those that there are, by suffix.

    Raises:
      UserError: another suffix; its folder is missing, or a folder has its name.
    """
    if path.suffix not in forms:
        *others, last = forms
        known = f"{', '.join(others)} or {last}"
        raise UserError(f"--output={printable(path)} must end in {known}.")
    if not path.parent.is_dir():
        raise UserError(f"--output: there is no folder {printable(path.parent)!r}.")
    if path.is_dir():
        raise UserError(f"--output={printable(path)} is a folder; give a file's name.")
    return forms[path.suffix]


@contextlib.contextmanager
def written(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """As `workdir.whole`, of `--output`.

    Raises:
      UserError: it cannot be written.
    """
    try:
        with whole(path) as part:
            yield part
    except OSError as error:
        raise UserError(f"cannot write to --output: {error}.") from error
