"""The code of docs/extending.md does what the page says."""

import dataclasses
import json
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
from command_line import SMALL
from flax import nnx
from train_test import small_config

from abe_jax import evaluate, losses, parallel, retrieval, train
from abe_jax.models import trunks

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
SECTIONS = dict(
    re.findall(
        r"^## (.+)\n(?:(?!## ).*\n)*?```python\n((?:.*\n)*?)```", PAGE.read_text(), re.M
    )
)


def code_of(section):
    code = SECTIONS[section]
    assert len(code.splitlines()) < 40
    names = {}
    exec(compile(code, f"{PAGE} ({section})", "exec"), names)
    return names


def registry_line(beginning):
    (line,) = re.findall(rf"^ +{re.escape(beginning)}.*\n", PAGE.read_text(), re.M)
    return line


def one_step():
    config = small_config()
    config.train.update(steps=1)
    return config


def test_every_section_is_tested():
    here = {"A trunk", "A loss", "A mode"}
    in_data = {"A data set", "A sampler"}  # tests/data/extending_data_test.py
    assert set(SECTIONS) == here | in_data  # a metric is a line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m_heads", "one_head"])
def test_a_trunk_trains_with_the_other_models(name, tmp_path, monkeypatch):
    monkeypatch.setitem(trunks.TRUNKS, "tiny", code_of("A trunk")["TINY"])
    config = one_step()
    config.model.update(trunk="tiny", name=name, width=0.5)
    metrics = train.train_and_evaluate(config, str(tmp_path))
    assert 0 <= metrics["eval/recall@1"] <= 1
    learners = {k.split("/")[1] for k in metrics if k.startswith("eval/learner_")}
    assert len(learners) == (1 if name == "one_head" else 2)


def test_a_trunk_computes_in_the_dtype_that_it_is_given():
    tiny = dataclasses.replace(code_of("A trunk")["TINY"], dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    maps, features = jax.eval_shape(
        lambda x: [
            tiny.section(stages, rngs=nnx.Rngs(0))(x)
            for stages in (tiny.stages[:2], tiny.stages)
        ],
        images,
    )
    assert (maps.dtype, features.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_loss_is_that_of_one_device_on_several(monkeypatch):
    loss = losses.MetricLoss(code_of("A loss")["n_pairs_loss"])
    monkeypatch.setitem(losses.METRIC_LOSSES, "n_pairs", loss)
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


def test_a_metric_is_what_it_says():
    line = "{" + registry_line('"r_precision": ') + "}"
    metric = eval(line, {"Metric": evaluate.Metric})["r_precision"]
    labels = np.array([0, 0, 0, 1, 1])
    rows = np.array([[1, 0], [0.58, 0.815], [0.9, 0.4], [0, 1], [0.1, 1]], np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    result = retrieval.evaluate_retrieval(rows, labels, ks=(1,))
    # Image 1 finds image 4 first, then image 2; all others find their own class.
    assert metric.of(result) == pytest.approx((1 + 1 / 2 + 1 + 1 + 1) / 5)


def test_files_and_lines_are_all_it_takes(tmp_path):
    """Those of the page, in a copy of the package that is started as users start it."""
    package = tmp_path / "abe_jax"
    shutil.copytree(ROOT / "abe_jax", package, ignore=shutil.ignore_patterns("__pyc*"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")

    def edit(file, *changes):
        text = (package / file).read_text()
        for old, new in changes:
            assert text.count(old) == 1, (file, old)
            text = text.replace(old, new)
        (package / file).write_text(text)

    def add(old, beginning):
        return old, old + registry_line(beginning)

    (package / "models" / "tiny.py").write_text(SECTIONS["A trunk"])
    imported = "from abe_jax.models import googlenet, resnet, vit\n"
    edit(
        "models/trunks.py",
        (imported, imported.replace("resnet,", "resnet, tiny,")),
        add("        *vit.FORMS,\n", "tiny.TINY"),
    )
    (package / "losses" / "n_pairs.py").write_text(SECTIONS["A loss"])
    beginning = "METRIC_LOSSES: dict[str, MetricLoss] = {\n"
    imported = "from abe_jax.losses.multi_similarity import multi_similarity_loss\n"
    edit(
        "losses/__init__.py",
        (imported, imported + "from abe_jax.losses.n_pairs import n_pairs_loss\n"),
        add(beginning, '"n_pairs": '),
    )
    edit("evaluate/measure.py", add("METRICS = {\n", '"r_precision": '))
    (package / "apply" / "counting.py").write_text(SECTIONS["A mode"])
    edit("main.py", add("_MODES = {\n", '"count": '))

    def start(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "abe_jax.main", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    ours = ("--config.model.trunk=tiny", "--config.loss.name=n_pairs")
    start(*SMALL, *ours, "--config.train.steps=1", "--workdir=run")
    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert all(
        0 < each["r_precision"] <= 1 for each in (measured, *measured["learners"])
    )
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(logged)["eval/r_precision"] == measured["r_precision"]
    said = start("--mode=count", "--workdir=run")
    assert re.fullmatch(r"[\d,]+ parameters", said.splitlines()[-1])
