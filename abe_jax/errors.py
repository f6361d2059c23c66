"""The one exception that means: the user can mend this; and others' in one line."""


class UserError(ValueError):
    """A mistake in a flag, a config or the data, told in one line.

    The message says what is wrong and what would be right; `abe_jax.main` prints it
    without a traceback and exits with status 1.
    """


def first_line(error: BaseException) -> str:
    """What an error says, or is where it says nothing, to be part of a line."""
    lines = str(error).strip().splitlines()
    return (lines[0][:300] if lines else type(error).__name__).rstrip(".")
