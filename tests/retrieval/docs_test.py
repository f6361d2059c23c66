"""The code in the documentation of retrieval."""

import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run(page):
    """Runs a page's code as one script; gives its names."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_code_of_the_page_runs():
    run("retrieval.md")


@pytest.mark.peers
def test_recipes_run():
    pytest.importorskip("sklearn")
    names = run("retrieval_recipes.md")
    assert 0.3 < names["f1"] < names["nmi"] < 1
    right = names["labels"][names["nearest"][:, 0]] == names["labels"]
    assert names["accuracy"] >= right.mean() > 0.5
    assert np.trace(names["confusion"]) == right.sum()
    assert names["result"].num_queries == 100
