"""Lets malloc take large pages, in which XLA's buffers on a CPU cost least."""

import os
import pathlib
import sys

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_large_pages() -> None:
    """Restarts this program, once, with glibc's tunable for large pages set.

    XLA's CPU backend frees its buffers after every step, and the system maps and zeroes
    them page by page in the next: with pages of 4 KiB, that is a fifth of a step of
    ABE-8 at 64 x 64. Keeping freed memory instead would fragment it: ResNet-50 at
    224 x 224 then takes 8.7 GiB instead of 1.4.

    glibc (from 2.35; others ignore it) reads the tunable only when a program starts.
    Does nothing where it is set already, to any value, or where Linux gives large pages
    to all programs or to none. Only for a program's entry point: whatever ran before
    this call runs again.
    """
    tunables = os.environ.get(_VARIABLE, "")
    if _TUNABLE in tunables or not sys.executable:
        return
    if not _SETTING.exists() or "[madvise]" not in _SETTING.read_text():
        return
    os.environ[_VARIABLE] = f"{tunables}:{_TUNABLE}=1".lstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
