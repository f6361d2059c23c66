"""A program that starts itself again: once, as it was called."""

import os
import subprocess
import sys

import pytest
from command_line import ROOT

PROGRAM = """
import os, pathlib, sys
from abe_jax import host_memory
host_memory._SETTING = pathlib.Path(sys.argv[1])
print(os.getpid(), sys.argv[2:], flush=True)
host_memory.use_large_pages()
print(os.environ.get("GLIBC_TUNABLES"), flush=True)
"""


def lines_of_a_start(tmp_path, setting, **environment):
    (tmp_path / "enabled").write_text(setting)
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    ended = subprocess.run(
        [sys.executable, file, tmp_path / "enabled", "--a=b c", "*"],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.splitlines()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.top_pad=1"},
            "glibc.malloc.top_pad=1:glibc.malloc.hugetlb=1",
        ),
    ],
)
def test_starts_again_once_as_it_was_called(tmp_path, before, after):
    first, second, tunables = lines_of_a_start(
        tmp_path, "always [madvise] never", **before
    )
    assert first == second  # one process, one command line
    assert "['--a=b c', '*']" in first
    assert tunables == after


@pytest.mark.parametrize(
    ("setting", "before"),
    [
        ("[always] madvise never", None),
        ("always madvise [never]", None),
        ("always [madvise] never", "glibc.malloc.hugetlb=0"),
    ],
)
def test_goes_on_where_nothing_is_to_be_gained(tmp_path, setting, before):
    environment = {} if before is None else {"GLIBC_TUNABLES": before}
    _, tunables = lines_of_a_start(tmp_path, setting, **environment)
    assert tunables == str(before)
