"""A run with metrics and its evaluation."""

import json

import pytest
from apply.conftest import make_run

from abe_jax import evaluate
from abe_jax.workdir import config_files


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    make_run(folder)
    lines = [
        {"step": 0, "eval/recall@1": 0.1, "eval/map_at_r": 0.05},
        {"step": 4, "train/loss": 3.0, "train/images_per_second": 50.0},
        {"step": 8, "train/loss": 2.0, "eval/recall@1": 0.2, "eval/map_at_r": 0.1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture(scope="session")
def evaluation(workdir):
    return evaluate.measure_checkpoint(config_files.of_workdir(workdir), str(workdir))
