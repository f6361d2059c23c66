"""Puts Ctrl-C off where Python, JAX or Grain would lose it.

Python drops whatever is raised in `__del__`, where Grain frees the memory that it
shares with workers, and in JAX's callback of the garbage collector; interrupted amid
its queues, Grain would leak memory or hang.
"""

import contextlib
import importlib.util
import os
import signal
import stat
import threading
from collections.abc import Iterator
from types import FrameType

_FOUND = importlib.util.find_spec("grain")  # not imported: --help needs none of it
assert _FOUND is not None and _FOUND.origin is not None
_GRAIN = os.path.join(os.path.dirname(_FOUND.origin), "")
_LOSING = ("__del__", "_xla_gc_callback")  # functions that lose what is raised
_RETRY_SECONDS = 0.5

_waiting = False  # whether a Ctrl-C is put off
_retried = False  # whether `_retry` sent the signal, not the user


class Interrupted(Exception):
    """The run was asked to stop, and its state is saved.

    Attributes:
      signal_number: what asked: SIGINT, SIGTERM or SIGHUP.
    """

    def __init__(self, step: int, signal_number: int):
        super().__init__(
            f"interrupted; step {step} is saved, run the same command to go on."
        )
        self.signal_number = signal_number


def wait_for_their_moment() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt, a little later where that would be lost; a
    second Ctrl-C raises it at once. For the main thread of a program.
    """
    signal.signal(signal.SIGINT, _handle)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within, Ctrl-C waits for the end: JAX is broken if interrupted as it is imported.

    For the main thread of a program.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def other_than_ctrl_c() -> list[signal.Signals]:
    """Signals that ask a program to end: SIGTERM, of a scheduler, and SIGHUP, of a lost
    connection, unless that is ignored, as under nohup.
    """
    kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM] if kept else [signal.SIGTERM, signal.SIGHUP]


def outlive_the_connection() -> None:
    """Lets the program end in order after SIGHUP: ignores the next one, and discards
    output to a terminal that is gone, where writing would raise.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for output in (1, 2):
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            if stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output):
                os.dup2(nowhere.fileno(), output)


@contextlib.contextmanager
def ended_by_others_too() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP do what Ctrl-C does; the status tells which it was.

    For the main thread of a program.

    Raises:
      SystemExit: with 143 or 129, once one of them has ended what is within.
    """
    asked = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        if number == signal.SIGHUP:
            outlive_the_connection()
        signal.raise_signal(signal.SIGINT)

    numbers = other_than_ctrl_c()
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    except KeyboardInterrupt:
        if not asked:
            raise
        raise SystemExit(128 + asked) from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def raise_if_one_waits() -> None:
    """Raises KeyboardInterrupt if a Ctrl-C was put off: here is a good moment."""
    global _waiting
    if _waiting:
        _waiting = False
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    global _retried, _waiting
    if _retried and not _waiting:  # it was taken in the meantime
        _retried = False
        return
    if _can_be_taken(frame) or (_waiting and not _retried):
        _waiting = _retried = False
        raise KeyboardInterrupt
    _waiting, _retried = True, False
    retry = threading.Timer(_RETRY_SECONDS, _retry)
    retry.daemon = True
    retry.start()


def _retry() -> None:
    global _retried
    main = threading.main_thread().ident
    if _waiting and main is not None:
        _retried = True
        signal.pthread_kill(main, signal.SIGINT)


def _can_be_taken(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_name in _LOSING or code.co_filename.startswith(_GRAIN):
            return False
        frame = frame.f_back
    return True
