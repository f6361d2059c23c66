"""SIGINT, SIGTERM, SIGHUP: the run saves its state, on all processes, and ends."""

import signal
from collections.abc import Callable

from abe_jax import interrupts, processes


class StopRequested(Exception):
    """All processes know that one of them was asked to stop."""


class StopRequest:
    """Remembers a signal; a second one of its kind has the effect that it had before.

    A second SIGHUP does nothing: it does not mean that the user is impatient.
    """

    def __init__(self, vote: processes.Vote):
        self._vote = vote
        self._requested = 0
        self._before: dict[int, Callable | int | None] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, *interrupts.other_than_ctrl_c()):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _) -> None:
        self._requested = number
        if number == signal.SIGHUP:
            interrupts.outlive_the_connection()
        else:
            signal.signal(number, self._before[number])

    @property
    def signal_number(self) -> int:
        """What asked; SIGTERM where it was another process that was asked."""
        return self._requested or signal.SIGTERM

    def check(self) -> None:
        """Raises StopRequested, on all processes at once, when one was asked."""
        if self._vote(bool(self._requested)):
            raise StopRequested
