"""What docs/use.md and its notebook say, done as they say it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from apply.conftest import make_run
from command_line import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos):
    """Where a reader would be: a run, some pictures, a query."""
    folder = tmp_path_factory.mktemp("reader")
    make_run(folder / "runs" / "photos")
    shutil.copytree(photos / "class00", folder / "my pictures")
    shutil.copy(photos / "class01" / "0.png", folder / "query.png")
    return folder


def commands() -> list[str]:
    """Those of the page, and of the README where it uses a trained model."""
    readme, page = (ROOT / name for name in ("README.md", "docs/use.md"))
    text = page.read_text()
    text += readme.read_text().split("## Use the model")[1].split("\n## ")[0]
    found = re.findall(r"^    (python -m abe_jax.main .*)$", text, re.M)
    return list(dict.fromkeys(found))


def start(arguments: list[str], folder) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("command", commands())
def test_commands(folder, command):
    python, *arguments = shlex.split(command, comments=True)
    assert python == "python"
    start([sys.executable, *arguments], folder)
    written = [a.partition("=")[2] for a in arguments if a.startswith("--output=")]
    assert all((folder / name).stat().st_size for name in written)


def test_every_mode_is_there():
    modes = {re.findall(r"--mode=(\w+)", command)[0] for command in commands()}
    assert modes == {"embed", "search", "evaluate", "report", "export"}


def test_python(folder):
    text = (ROOT / "docs" / "use.md").read_text()
    (code,) = re.findall(r"## In Python\n\n```python\n(.*?)```", text, re.S)
    output = start([sys.executable, "-c", code], folder)
    assert len(output.splitlines()) == 6


def test_notebook(folder):
    notebook = json.loads((ROOT / "docs" / "use.ipynb").read_text())
    cells = [
        "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"
    ]
    assert all(c.get("outputs", []) == [] for c in notebook["cells"])
    output = start([sys.executable, "-c", "\n".join(cells)], folder)
    assert "cosine" in output
    assert (folder / "neighbours.png").exists()
