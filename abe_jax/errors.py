"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in a flag, a config or the data, told in one line.

    The message says what is wrong and what would be right; `abe_jax.main` prints it
    without a traceback and exits with status 1.
    """
