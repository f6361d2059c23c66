"""Where a result goes."""

import pathlib

from abe_jax.data.datasets.tree import shown
from abe_jax.errors import UserError


def require_a_place(path: pathlib.Path) -> None:
    """Checks, before hours of work, that a file of `--output` can be put there.

    Raises:
      UserError: its folder is missing, or a folder has its name.
    """
    if not path.parent.is_dir():
        raise UserError(f"--output: there is no folder {shown(path.parent)!r}.")
    if path.is_dir():
        raise UserError(f"--output={shown(path)} is a folder; give a file's name.")
