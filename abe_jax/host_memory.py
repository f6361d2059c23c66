"""Lets malloc take large pages, in which XLA's buffers on a CPU cost least."""

import os
import pathlib
import sys

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_large_pages() -> None:
    """Starts this program again, with glibc's tunable for large pages; once.

    XLA's CPU backend frees its buffers after every step, and the system maps and zeroes
    them page by page in the next: a fifth of a step of ABE-8 at 64 x 64, with pages of
    4 KiB. To keep freed memory instead breaks it into pieces: ResNet-50 at 224 x 224
    grew to 8.7 GiB, where it now takes 1.4.

    glibc (from 2.35; others pass over it) reads the tunable only when a program starts.
    Returns where it is set already, to any value, and where Linux gives large pages to
    all programs or to none. To be called by a program's entry point alone: what ran
    before runs again.
    """
    tunables = os.environ.get(_VARIABLE, "")
    if _TUNABLE in tunables or not sys.executable:
        return
    if not _SETTING.exists() or "[madvise]" not in _SETTING.read_text():
        return
    os.environ[_VARIABLE] = f"{tunables}:{_TUNABLE}=1".lstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
