"""A part of the campaign that docs/reliability.md tells of; the whole is a script."""

import os
import pathlib
import subprocess
import sys

import pytest

CAMPAIGN = pathlib.Path(__file__).parent / "campaign.py"


@pytest.mark.campaign
@pytest.mark.parametrize(
    "arguments",
    [
        ["--kills=2", "--terms=1", "--seed=1"],
        ["--kills=1", "--terms=1", "--seed=2", "--processes=2"],
    ],
    ids=["one process", "two processes"],
)
def test_killed_and_interrupted_runs_end_bit_for_bit_as_others(arguments):
    # In a process of its own: it forks, which none that has touched a device may.
    ended = subprocess.run(
        [sys.executable, CAMPAIGN, "--runs=1", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "run 0 ended bit for bit as the undisturbed one" in ended.stdout
