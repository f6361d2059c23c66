"""Keeps the memory that XLA frees between steps, instead of returning it."""

import ctypes
import sys

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed; call before JAX starts.

    XLA's CPU backend frees its buffers after every step. Given back to the system they
    are mapped, and zeroed page by page, again in the next: a third of the time of a
    small step. Does nothing where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_ARENA_MAX, 1)
