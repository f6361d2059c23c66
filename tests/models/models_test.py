"""What `models.create` makes of a config."""

import ast
import dataclasses
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from PIL import Image

from abe_jax import losses, models, pretrained
from abe_jax.errors import UserError
from abe_jax.models.batch_norm import BatchNorm
from abe_jax.models.shapes import without_values
from abe_jax.models.trunks import TRUNKS
from abe_jax.models.weights import layer_of

NAMES = ("abe", "m_heads", "one_head")
DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(autouse=True)
def _quick_compilation():
    """The tests compile for longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _config(**changes):
    fields = {
        "name": "abe",
        "trunk": "googlenet",
        "num_learners": 4,
        "embedding_dim": 32,
        "width": 0.125,
    }
    return ConfigDict(fields | changes)


def _abstract(**changes):
    return without_values(lambda rngs: models.create(_config(**changes), rngs=rngs))


def _paths(state):
    return traverse_util.flatten_dict(nnx.to_pure_dict(state))


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("name", NAMES)
def test_interface(name, trunk):
    model = _abstract(name=name, trunk=trunk)
    assert model.preprocessing == TRUNKS[trunk].preprocessing
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((2, 112, 112, 3), jnp.float32)
    embeddings = jax.eval_shape(
        lambda s, x: nnx.merge(graphdef, s, copy=True)(x), state, images
    )
    learners = 1 if name == "one_head" else 4
    assert embeddings.shape == (2, learners, 32 // learners)
    assert embeddings.dtype == jnp.float32
    assert all(isinstance(key, str) for path in _paths(state) for key in path)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_those_of_values(name):
    config = _config(name=name)
    made = nnx.eval_shape(lambda: models.create(config, rngs=nnx.Rngs(0)))
    found = _abstract(name=name)
    assert nnx.graphdef(found) == nnx.graphdef(made)
    assert _paths(nnx.state(found)) == _paths(nnx.state(made))


def test_heads_differ_and_each_is_a_one_head():
    model = models.create(_config(name="m_heads", num_learners=2), rngs=nnx.Rngs(0))
    single = models.create(_config(name="one_head", embedding_dim=16), rngs=nnx.Rngs(1))
    images = jax.random.normal(jax.random.key(0), (3, 160, 160, 3))
    embeddings = nnx.jit(lambda m, x: m(x))(model, images)
    np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=-1), 1, rtol=1e-5)

    @nnx.jit
    def run(m, spatial, head, images):
        nnx.update(m.spatial, spatial)
        nnx.update(m.global_features, head["global_features"])
        nnx.update(m.head, head["head"])
        return m(images)[:, 0]

    spatial, heads = nnx.state(model.spatial), nnx.state(model.heads)
    for learner in range(2):
        head = jax.tree.map(lambda leaf, learner=learner: leaf[learner], heads)
        alone = run(single, spatial, head, images)
        np.testing.assert_allclose(embeddings[:, learner], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("learners", "spread"), [(1, 1.0), (2, 1.0), (8, 1.0), (4, 3.0)]
)
def test_the_masks_of_each_learner_start_as_a_layer_of_their_own(learners, spread):
    """Glorot's limit is that of 480 outputs, not of those of all learners together."""
    config = _config(num_learners=learners, attention_spread=spread)
    model = models.create(config, rngs=nnx.Rngs(0))
    kernel = np.asarray(model.attention_branch.last.kernel[...])
    limit = spread * np.sqrt(6 / (kernel.shape[2] + kernel.shape[3] // learners))
    assert 0.98 * limit < abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.03)


@pytest.mark.parametrize("sparing", [False, True])
def test_abe_by_its_definition(sparing):
    config = _config(learners_in_turn=sparing, rematerialize=sparing)
    model = models.create(config, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 80, 80, 3))

    @nnx.jit
    def run(model, images):
        maps = model.spatial(images)
        masks = model.attention(images)
        # B_m(x) = G(S(x) * A_m(S(x))), learner by learner.
        features = [
            model.head(model.global_features(maps * masks[:, m])) for m in range(4)
        ]
        return model(images), masks, jnp.stack(features, axis=1)

    embeddings, masks, features = run(model, images)
    assert masks.shape == (2, 4, 5, 5, 60)
    assert ((masks > 0) & (masks < 1)).all()
    expected = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(embeddings, expected, rtol=1e-4, atol=1e-5)
    assert (jnp.std(masks, axis=1) > 0).all()


@pytest.mark.parametrize(
    ("branch", "blocks", "side", "channels"),
    [("pool2", 1, 16, 24), ("3a", 2, 16, 32), ("pool3", 7, 8, 60), ("4b", 3, 8, 64)],
)
def test_the_papers_switches(branch, blocks, side, channels):
    """Figure 7: where S ends, and how much the attention branch copies."""
    fields = {"branch": branch, "attention_blocks": blocks}
    model = _abstract(**fields)
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)

    def run(state, images):
        model = nnx.merge(graphdef, state, copy=True)
        return model(images), model.attention(images)

    embeddings, masks = jax.eval_shape(run, state, images)
    assert embeddings.shape == (2, 4, 8)
    assert masks.shape == (2, 4, side, side, channels)
    # S, G and what is copied are the same layers wherever the cut is.
    paths = {
        layer_of(path)[0]
        for path in _paths(state)
        if path[0] != "head" and path[1] != "last"
    }
    assert len(paths) == 12
    copied = {path[2] for path in _paths(state) if path[1] == "common"}
    assert len(copied) == blocks
    heads = _abstract(name="m_heads", branch=branch)
    assert nnx.state(heads.heads)["global_features"].keys() == {
        name for name in nnx.state(model.global_features)
    }


@pytest.mark.slow
def test_heads_train_over_a_mapped_axis():
    """Gradients of all parameters and new averages come out, in their shapes."""
    model = _abstract(name="m_heads", trunk="googlenet_bn")
    model = nnx.view(model, use_running_average=False)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def step(params, rest, images):
        def loss(params):
            net = nnx.merge(graphdef, nnx.State(params), nnx.State(rest), copy=True)
            embeddings = net(net.preprocessing(images))
            return losses.divergence_loss(embeddings), nnx.to_pure_dict(
                nnx.state(net, nnx.Not(nnx.Param))
            )

        return jax.grad(loss, has_aux=True)(params)

    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=False
    )
    images = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.uint8)
    gradients, after = jax.eval_shape(mapped, params, rest, images)
    shapes = jax.tree.map(lambda leaf: leaf.shape, (params, rest))
    assert jax.tree.map(lambda leaf: leaf.shape, (gradients, after)) == shapes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("trunk", "own", "copied"), [("googlenet_bn", 57, 30), ("resnet50", 53, 10)]
)
def test_freezing_reaches_every_batch_norm(name, trunk, own, copied):
    model = _abstract(name=name, trunk=trunk, freeze_batch_norm=True)
    norms = [node for _, node in nnx.iter_graph(model) if isinstance(node, BatchNorm)]
    assert len(norms) == own + (copied if name == "abe" else 0)
    assert all(norm.frozen for norm in norms)


@pytest.mark.parametrize("name", NAMES)
def test_new_layers(name):
    params = _paths(nnx.state(_abstract(name=name), nnx.Param))
    new = {path for path in params if models.is_new_layer(path)}
    prefixes = {
        "abe": {("attention_branch", "last"), ("head",)},
        "m_heads": {("heads", "head")},
        "one_head": {("head",)},
    }[name]
    assert new == {(*p, leaf) for p in prefixes for leaf in ("kernel", "bias")}
    # All others have a source in a pretrained GoogLeNet, of their shape.
    form = dataclasses.replace(TRUNKS["googlenet"], width=0.125)
    whole = without_values(lambda rngs: form.section(form.stages, rngs=rngs))
    sources = _paths(nnx.state(whole))
    for path in params.keys() - new:
        shape = sources[layer_of(path)].shape
        assert params[path].shape in (shape, (4, *shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet"}, "'abe', 'm_heads', 'one_head'"),
        ({"branch": "pool4"}, "known are 'pool3', 'pool2', '3a', '4a', '4b'"),
        ({"branch": "4b", "attention_blocks": 6}, "can copy 1 to 5 blocks"),
        ({"attention_blocks": 0}, "can copy 1 to 7 blocks"),
        ({"trunk": "vgg"}, "'googlenet', 'googlenet_bn'"),
        ({"num_learners": 5}, "is not divisible"),
        (
            {"num_learners": 0},
            "num_learners = 0 and model.embedding_dim = 32 must be 1",
        ),
        ({"width": 0.0}, "above 0"),
        ({"freeze_batch_norm": True}, "'googlenet_bn'"),
        (
            {"trunk": "googlenet_bn", "learners_in_turn": True},
            "learners_in_turn needs model.freeze_batch_norm=True",
        ),
        (
            {"name": "m_heads", "learners_in_turn": True},
            "learners_in_turn is for model.name = 'abe', not 'm_heads'",
        ),
        ({"pretrained": "x.onnx"}, "model.width = 1"),
        ({"pretrained": "x.onnx", "width": 1.0}, "no such file"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        _abstract(**changes)


def test_creation_is_reproducible():
    first, second = (
        models.create(_config(name="one_head"), rngs=nnx.Rngs(7)) for _ in range(2)
    )
    jax.tree.map(
        np.testing.assert_array_equal, *(_paths(nnx.state(m)) for m in (first, second))
    )


def test_the_documented_statements_run(tmp_path, monkeypatch):
    page = DOCS.read_text()
    assert len(page.split("\n## ")[1].splitlines()) <= 30
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert all(len(ast.parse(block).body) <= 5 for block in blocks)
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    # A narrow model compiles sooner; published weights would not fit into it.
    narrow = dataclasses.replace(TRUNKS["googlenet"], width=0.125)
    monkeypatch.setattr(models, "ABE", partial(models.ABE, trunk=narrow))
    monkeypatch.setattr(pretrained, "initialize", lambda model, path: None)
    names = {"paths": paths, "labels": np.asarray([0, 0, 1, 1, 2, 2])}
    exec("".join(blocks), names)
    assert names["embeddings"].shape == (6, 8, 64)
    assert names["masks"].shape == (6, 8, 14, 14, 60)
    assert names["indices"].shape == (6, 3)
    assert (tmp_path / "attention.png").exists()


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (models.ABE, {"num_learners": 3}, "512 is not divisible by model.num_learners"),
        (models.MHeads, {"embedding_dim": 4}, "4 is not divisible"),
        (models.ABE, {"attention_blocks": 0}, "can copy 1 to 7 blocks of 'googlenet'"),
        (models.ABE, {"attention_blocks": 9}, "can copy 1 to 7 blocks"),
        (models.ABE, {"branch": "pool4"}, "known are 'pool3'"),
        (models.MHeads, {"branch": "pool4"}, "known are 'pool3'"),
        (models.ABE, {"trunk": "vgg"}, "model.trunk is 'vgg'; known are 'googlenet'"),
        (
            models.ABE,
            {"trunk": "googlenet_bn", "learners_in_turn": True},
            "needs model.freeze_batch_norm=True",
        ),
    ],
)
def test_impossible_models_of_the_library(make, changes, message):
    sizes = {"num_learners": 8, "embedding_dim": 512, **changes}
    with pytest.raises(UserError, match=re.escape(message)):
        make(**sizes, rngs=nnx.Rngs(0))


def test_a_one_head_without_dimensions_is_refused():
    with pytest.raises(UserError, match="model.embedding_dim = 0 must be 1 or"):
        models.OneHead(embedding_dim=0, rngs=nnx.Rngs(0))
