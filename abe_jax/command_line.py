"""What both programs do with their command line and with the user's errors."""

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Sequence

from absl import flags

from abe_jax.errors import UserError


def parse_flags(
    argv: Sequence[str],
    help_text: Callable[[], str],
    arrange: Callable[[Sequence[str]], list[str]] = list,
) -> list[str]:
    """Parses all flags; stands in for absl's own, whose help and errors are long.

    Args:
      argv: program name and arguments.
      help_text: makes what --help prints.
      arrange: puts the arguments into the order that parsing needs.

    Returns:
      what is left of `argv`: the program name and anything that is no flag.

    Raises:
      SystemExit: status 0 after --help, 1 after one line on a flag that is wrong.
    """
    if {"-h", "-help", "--help"} & set(argv):
        print(help_text())
        sys.exit(0)
    try:
        sys.argv = arrange(argv)  # where ml_collections looks for overrides
        return flags.FLAGS(sys.argv)
    except Exception as error:  # a config file is a program, and fails like one
        print_line(_message(error))
    sys.exit(1)


def take(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The last value of a flag in arguments that are not parsed, and the others."""
    value, rest = None, []
    words = iter(argv)
    for word in words:
        if word == "--":
            return value, [*rest, word, *words]
        if word in (f"-{name}", f"--{name}"):
            value = next(words, None)
        elif word.startswith((f"-{name}=", f"--{name}=")):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises UserError where anything but flags was given."""
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; flags start with --.")


def be_quiet() -> None:
    """From here on progress is not shown."""
    logging.getLogger("abe_jax").setLevel(logging.WARNING)


def is_quiet() -> bool:
    """Whether progress is not to be shown."""
    return logging.getLogger("abe_jax").level > logging.INFO


def print_line(error: object) -> None:
    """Prints an error, or its message, as one line, where somebody reads it."""
    # One write: with PYTHONUNBUFFERED, print makes two, and threads of JAX's write too.
    with contextlib.suppress(OSError):  # of a reader that is gone, as `| tee` is
        sys.stderr.write(f"abe_jax: {' '.join(str(error).split())}\n")


def without_traceback(record: logging.LogRecord) -> bool:
    """Logging filter that drops tracebacks: the error itself is raised as well."""
    record.exc_info = None
    return True


def _message(error: Exception) -> object:
    """The error's message, reworded where that of ml_collections would be obscure."""
    # ml_collections re-raises a config file's error, with its traceback as the text.
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in reversed(causes):
        if isinstance(cause, UserError):
            return cause
    head, in_file, trace = str(error).partition("Error whilst parsing config file:")
    if in_file:
        return f"{head}the file fails with {trace.strip().splitlines()[-1]}"
    if isinstance(error, IndexError):
        return (
            f"a config's field cannot be overridden in part ({error}); give all of it."
        )
    if not isinstance(error, AttributeError | KeyError):
        return error if str(error).strip() else f"the config: {type(error).__name__}."
    inner: object = error
    while isinstance(inner, AttributeError | KeyError) and inner.args:
        inner = inner.args[0]
    found = re.fullmatch(r"['\"]*(\w+)['\"]*(?:\n(.*))?", str(inner))
    return f"the config has no field {found[1]!r}. {found[2] or ''}" if found else inner
