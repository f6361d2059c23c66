"""How the program ends when something outside of it goes wrong."""

import os
import subprocess
import sys

import pytest
from command_line import ROOT

_END = """
import sys, types
from abe_jax import main

def fail(argv):
    raise {error}

main._main = fail
main._MODE = types.SimpleNamespace(value={mode!r})
main._several_processes = lambda: False
main._guarded_main([])
"""


@pytest.mark.parametrize(
    ("error", "mode", "message", "status"),
    [
        ("KeyboardInterrupt", "train", "stopped at once; what was done since", 130),
        ("KeyboardInterrupt", "search", "stopped at once.", 130),
        ("KeyboardInterrupt", "dry_run", "stopped at once.", 130),
        (
            "PermissionError(13, 'Permission denied', '/root/photos')",
            "embed",
            "cannot use '/root/photos': Permission denied.",
            1,
        ),
    ],
)
def test_an_end_from_outside_is_one_line(error, mode, message, status):
    ended = subprocess.run(
        [sys.executable, "-c", _END.format(error=error, mode=mode)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == status
    (line,) = ended.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("error", "status"), [("KeyboardInterrupt", 130), ("BrokenPipeError", 141)]
)
def test_a_reader_that_is_gone_leaves_the_status(error, status):
    """Ctrl-C ends `tee` first, where both outputs of training are piped to it."""
    reader, writer = os.pipe()
    os.close(reader)
    program = _END.format(error=error, mode="train")
    ended = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=writer, cwd=ROOT
    )
    os.close(writer)
    assert ended.returncode == status
