"""A trace of some training steps, for XProf and TensorBoard's profile page."""

import pathlib
from typing import Any

import jax


class Trace:
    """Traces host and devices for some steps, into `plugins/profile` of the workdir.

    It begins at the third step, when nothing compiles any more. For process 0 of
    several, as each would trace the same.
    """

    def __init__(self, workdir: pathlib.Path, *, start: int, steps: int):
        """Traces nothing yet.

        Args:
          workdir: of the run.
          start: steps that the run has behind it.
          steps: how many to trace; 0 for none.
        """
        self._workdir = workdir
        self._first = start + 2
        self._last = self._first + steps
        self._running = False

    def before_step(self, step: int, state: Any) -> None:
        """Begins or ends the trace where it is time, when the device is idle.

        Args:
          step: how many steps are behind.
          state: arrays of the last step.
        """
        if step == self._first < self._last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._workdir))
            self._running = True
        elif step == self._last and self._running:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace, if it is under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
