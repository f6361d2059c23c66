"""The code of docs/extending.md does what the page says."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apply.conftest import make_run
from train_test import small_config

from abe_jax import evaluate, losses, parallel, train
from abe_jax.models import trunks

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
SECTIONS = dict(
    re.findall(
        r"^## (.+)\n(?:.*\n)*?```python\n((?:.*\n)*?)```", PAGE.read_text(), re.M
    )
)


@pytest.fixture(autouse=True)
def _registries_as_before():
    registries = (trunks.TRUNKS, losses.METRIC_LOSSES, evaluate.METRICS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


def add(section):
    code = SECTIONS[section]
    assert len(code.splitlines()) < 40
    names = {}
    exec(compile(code, f"{PAGE} ({section})", "exec"), names)
    return names


def one_step():
    config = small_config()
    config.train.update(steps=1)
    return config


def test_every_section_is_tested():
    here = {"A trunk", "A loss", "A metric", "A mode"}
    in_data = {"A data set", "A sampler"}  # tests/data/extending_data_test.py
    assert set(SECTIONS) == here | in_data


@pytest.mark.parametrize(
    "name",
    [
        "abe",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("m_heads", "one_head")),
    ],
)
def test_a_trunk_trains_with_every_model(name, tmp_path):
    add("A trunk")
    config = one_step()
    config.model.update(trunk="tiny", name=name, width=0.5)
    metrics = train.train_and_evaluate(config, str(tmp_path))
    assert 0 <= metrics["eval/recall@1"] <= 1
    learners = {k.split("/")[1] for k in metrics if k.startswith("eval/learner_")}
    assert len(learners) == (1 if name == "one_head" else 2)


def test_a_loss_is_that_of_one_device_on_several():
    add("A loss")
    config = small_config().loss
    config.name = "n_pairs"
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(16, 2, 4))
    rows = jnp.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), jnp.float32)
    labels = jnp.asarray(np.arange(16) % 5, jnp.int32)

    def shares(devices):
        def program(_, batch):
            def share(x):
                return losses.total(x, batch["label"], {}, config, axis_name="data")[0]

            value, gradient = jax.value_and_grad(share)(batch["x"])
            return {"share": value[None], "gradient": gradient}

        mesh = parallel.make_mesh(jax.devices()[:devices])
        mapped = parallel.map_over_devices(program, mesh, rows_out=True)
        batch = parallel.split_rows({"x": rows, "label": labels}, mesh)
        got = mapped(parallel.replicate(jnp.zeros(()), mesh), batch)
        return float(jnp.sum(got["share"])), np.asarray(got["gradient"])

    one, four = shares(1), shares(4)
    assert one[0] == pytest.approx(four[0], rel=1e-5)
    np.testing.assert_allclose(one[1], four[1], atol=1e-5)
    assert one[0] > 0


def test_a_metric_is_in_the_evaluation():
    add("A metric")
    rows = np.eye(4, dtype=np.float32)[np.array([0, 0, 1, 1])][:, None]
    measured = evaluate.measure(rows, np.array([0, 0, 1, 1]), (1,))
    assert measured["learners"][0]["r_precision"] == 1.0
    assert evaluate.scalars(measured)["eval/r_precision"] == 1.0


@pytest.mark.slow
def test_a_mode_is_a_file_and_a_line(tmp_path):
    """Both are added to a copy of the package, which is started as users start it."""
    package = tmp_path / "abe_jax"
    shutil.copytree(ROOT / "abe_jax", package, ignore=shutil.ignore_patterns("__pyc*"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (package / "apply" / "counting.py").write_text(SECTIONS["A mode"])
    (line,) = re.findall(r'^    ("count": .*\n)', PAGE.read_text(), re.M)
    main = package / "main.py"
    main.write_text(main.read_text().replace("_MODES = {\n", "_MODES = {\n" + line))
    make_run(tmp_path / "run")
    command = [sys.executable, "-m", "abe_jax.main", "--mode=count"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[\d,]+ parameters", done.stdout.splitlines()[-1])
