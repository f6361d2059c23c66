"""`UserError`, for mistakes that the user can fix, and what makes one line of them."""

from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a flag, a config or the data, told in one line.

    The message says what is wrong and what would be right; `abe_jax.main` prints it
    without a traceback and exits with status 1.
    """


def require_known(what: str, value: str, known: Iterable[str]) -> None:
    """Checks a name that the user gave.

    Args:
      what: the flag or field that it was given by.
      value: the name.
      known: those that there are.

    Raises:
      UserError: it is none of them.
    """
    names = list(known)
    if value not in names:
        listed = ", ".join(map(repr, names))
        raise UserError(f"{what} is {value!r}; known are {listed}.")


def first_line(error: BaseException) -> str:
    """An error's first line, or its type's name if it has no message, to be quoted."""
    lines = str(error).strip().splitlines()
    return (lines[0][:300] if lines else type(error).__name__).rstrip(".")
