"""The PyTorch peer of the benchmarks does the work that ours does."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

ROOT = pathlib.Path(__file__).parents[2]

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("trunk", ["googlenet", "resnet50"])
def test_embeddings_and_loss_are_ours(trunk, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import abe_cases
    import abe_torch

    from abe_jax import losses, models

    case = abe_cases.Case(learners=2, size=64, batch=4, dtype="float32", trunk=trunk)
    model = models.create(case.config().model, rngs=nnx.Rngs(0))
    embed = jax.jit(lambda images: model(model.preprocessing(images)))
    embeddings = embed(jnp.asarray(case.images(), jnp.float32))
    labels = jnp.asarray(case.labels())
    divergence = losses.divergence_loss(embeddings)
    loss = losses.contrastive_loss(embeddings, labels) + divergence

    net = abe_torch.ABE(case.learners, abe_cases.EMBEDDING_DIM, trunk).eval()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    abe_torch.copy_weights(net, traverse_util.flatten_dict(params))
    theirs = net(abe_torch.preprocess(case.images(), "cpu", trunk)).detach()
    np.testing.assert_allclose(embeddings, theirs, atol=1e-5)
    their_loss = abe_torch.loss_of(theirs, torch.from_numpy(case.labels()))
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5)


@pytest.mark.parametrize("name", ["train_step", "inference"])
def test_benchmarks_run(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    arguments = ["--cases=32:2", "--learners=2", "--turns=1", "--seconds=0.1"]
    subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *arguments, f"--json={path}"],
        cwd=ROOT,
        check=True,
    )
    ours, peer = map(json.loads, path.read_text().splitlines())
    assert (ours["method"], peer["method"]) == ("abe_jax", "PyTorch")
    assert ours["images/s"] > 0 and peer["to peer"] == 1
    assert ours["commit"] and ours["date"]
