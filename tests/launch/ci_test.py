"""What .ci/run leaves out where something is missing, it says."""

import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tests_on_the_newest_python_are_not_left_out_silently(tmp_path):
    text = (ROOT / ".ci" / "run").read_text()
    block = re.search(r"^newest=''\n.*?^fi\n", text, re.M | re.S)
    bash = shutil.which("bash")
    assert block and bash
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", block[0]],
        env={"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path)},  # no Python at all
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (
        "== NOT RUN: the tests on the newest Python, "
        "since there is no python3.13 here\n"
    )
