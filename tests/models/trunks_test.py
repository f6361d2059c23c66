"""ResNet-50 and vision transformers as trunks: masks, training, files of weights."""

import dataclasses
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.conftest import one_head
from short import shorten

from abe_jax import models, optimizer, parallel, pretrained, train_step
from abe_jax.errors import UserError
from abe_jax.models import hub, vit, weight_files, weights
from abe_jax.models.shapes import without_values
from abe_jax.models.trunk import Tokens, masked
from abe_jax.models.trunks import TRUNKS
from configs import quickstart

# One of each kind; `models_test` traces all of them.
KINDS = ("resnet50", "vit_small_patch16", "vit_small_patch14_reg4_dinov2")
# ABE's gradient by each trunk is compared with PyTorch's in `trunks_peers_test`.
SLOW = [("abe", "vit_small_patch16"), ("m_heads", "vit_small_patch16")]
SLOW += [("one_head", "resnet50")]
# Networks: those of "_dino" are those of others, with another input.
NEW = [n for n in TRUNKS if not n.startswith("googlenet") and not n.endswith("_dino")]
BATCH = 8
# Of ImageNet, as timm writes them.
DINO, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small_config(trunk, name="abe", **model):
    config = quickstart.get_config()
    config.model.update(name=name, trunk=trunk, num_learners=2, embedding_dim=8)
    config.model.update(width=0.05, **model)
    size = 2 * TRUNKS[trunk].preprocessing.multiple_of if "vit" in trunk else 32
    config.data.update(load_size=size + 4, image_size=size)
    config.train.update(batch_size=BATCH, steps=10)
    return config


def one_step(config, devices=2):
    """The model, its variables before and after a step, and the step's metrics."""
    mesh = parallel.make_mesh(jax.devices()[:devices])
    model = models.create(config.model, rngs=nnx.Rngs(0))
    optimiser, rate = optimizer.create(config.train)
    take_step = parallel.map_over_devices(
        train_step.make_train_step(model, optimiser, rate, config), mesh
    )
    state = train_step.initial_state(model, optimiser)
    rng = np.random.default_rng(0)
    size = config.data.load_size
    images = rng.integers(0, 256, (BATCH, size, size, 3), np.uint8)
    batch = {"image": images, "label": np.arange(BATCH, dtype=np.int32) // 2}
    placed = parallel.split_rows(batch, mesh)
    after, metrics = take_step(parallel.replicate(state, mesh), placed)
    return model, state, jax.device_get(after), jax.device_get(metrics), images


@pytest.mark.parametrize(
    ("name", "trunk"),
    [
        pytest.param(
            *pair, marks=pytest.mark.slow if pair in SLOW else pytest.mark.campaign
        )
        for pair in itertools.product(("abe", "m_heads", "one_head"), KINDS)
    ],
)
def test_a_step_then_embeddings_and_masks(name, trunk, monkeypatch):
    if (name, trunk) in SLOW:  # the campaign has the whole ones
        shorten(monkeypatch)
    config = small_config(trunk, name)
    model, before, state, metrics, images = one_step(config)
    assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0
    moved = jax.tree.map(lambda a, b: np.any(a != b), before.params, state.params)
    # Layer scale starts at 1e-5: behind it a step may be lost in rounding.
    assert all(jax.tree.leaves(moved)) or "dinov2" in trunk
    size = config.data.image_size
    variables = (state.params, state.model_state)
    embed = jax.jit(train_step.make_embed_step(model, size))
    embeddings = embed(variables, jnp.asarray(images))
    learners = 1 if name == "one_head" else 2
    assert embeddings.shape == (BATCH, learners, 8 // learners)
    np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=-1), 1, rtol=1e-5)
    if name == "abe":
        attend = jax.jit(train_step.make_attention_step(model, size))
        masks = attend(variables, jnp.asarray(images))
        channels = dataclasses.replace(TRUNKS[trunk], width=0.05).channels(
            TRUNKS[trunk].branches[0]
        )
        assert masks.shape == (BATCH, 2, 2, 2, channels)
        assert ((masks > 0) & (masks < 1)).all() and masks.std() > 0


@pytest.mark.parametrize(
    "trunk",
    [
        pytest.param(
            kind, marks=pytest.mark.slow if kind == KINDS[1] else pytest.mark.campaign
        )
        for kind in KINDS
    ],
)
def test_options_change_little(trunk, monkeypatch):
    """bfloat16 rounds; computing blocks again changes nothing."""
    if trunk == KINDS[1]:
        shorten(monkeypatch)
    _, _, _, plain, _ = one_step(small_config(trunk))
    _, _, _, again, _ = one_step(small_config(trunk, rematerialize=True))
    np.testing.assert_allclose(again["loss"], plain["loss"], rtol=1e-5)
    np.testing.assert_allclose(
        again["gradient_norm"], plain["gradient_norm"], rtol=1e-3
    )
    frozen = {"freeze_batch_norm": True} if trunk == "resnet50" else {}
    if frozen:  # eight values a channel in its last blocks would enlarge rounding
        _, _, _, plain, _ = one_step(small_config(trunk, **frozen))
    _, _, _, rounded, _ = one_step(small_config(trunk, dtype="bfloat16", **frozen))
    assert rounded["gradient_norm"] != plain["gradient_norm"]  # a loss may be at bounds
    np.testing.assert_allclose(rounded["loss"], plain["loss"], rtol=0.1)


@pytest.mark.slow
def test_frozen_averages_stay(monkeypatch):
    shorten(monkeypatch)
    config = small_config("resnet50", freeze_batch_norm=True)
    _, before, state, _, _ = one_step(config)
    jax.tree.map(np.testing.assert_array_equal, before.model_state, state.model_state)


@pytest.mark.parametrize(
    ("trunk", "branch", "blocks", "side", "channels"),
    [
        ("resnet50", "layer2", 6, 16, 64),
        ("resnet50", "layer3", 2, 8, 128),
        ("vit_base_patch16", "block1", 3, 8, 96),
        ("vit_small_patch16", "block11", 1, 8, 48),
    ],
)
def test_where_the_cut_is(trunk, branch, blocks, side, channels):
    fields = small_config(trunk, branch=branch, attention_blocks=blocks).model
    fields.width = 0.125
    model = without_values(lambda rngs: models.create(fields, rngs=rngs))
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((3, 128, 128, 3), jnp.float32)

    def run(state, images):
        model = nnx.merge(graphdef, state, copy=True)
        return model(images), model.attention(images)

    embeddings, masks = jax.eval_shape(run, state, images)
    assert embeddings.shape == (3, 2, 4)
    assert masks.shape == (3, 2, side, side, channels)
    copied = {path[2] for path in weights.flat(state) if path[1] == "common"}
    assert len(copied) == blocks


def test_masks_meet_maps_and_no_other_token():
    rng = np.random.default_rng(0)
    maps, others, masks = (
        jnp.asarray(rng.random(shape, np.float32))
        for shape in ((3, 2, 4, 5), (3, 6, 5), (7, 3, 2, 4, 5))
    )
    seen = masked(Tokens(maps, others), masks)
    assert isinstance(seen, Tokens)
    for image in range(3):
        for learner in range(7):
            row = 3 * learner + image
            expected = maps[image] * masks[learner, image]
            np.testing.assert_array_equal(seen.maps[row], expected)
            np.testing.assert_array_equal(seen.others[row], others[image])
    np.testing.assert_array_equal(masked(maps, masks), seen.maps)


def test_positions_are_those_of_the_grid():
    """Unchanged at the published size; resized, a ramp stays a ramp in the middle."""
    form = dataclasses.replace(TRUNKS["vit_small_patch16"], width=0.02)
    embedding = vit.Embedding(form=form, rngs=nnx.Rngs(0))
    black = jnp.zeros((1, 224, 224, 3))
    position = embedding.position[...]
    tokens = embedding(black)
    np.testing.assert_array_equal(tokens.maps.reshape(1, 196, -1), position[:, 1:])
    token = embedding.class_token[...] + position[:, :1]
    np.testing.assert_array_equal(tokens.others, token)
    ramp = jnp.broadcast_to(jnp.arange(14.0)[:, None, None], (14, 14, 6))
    ramp = jnp.concatenate([position[:, :1], ramp.reshape(1, 196, 6)], axis=1)
    embedding.position[...] = ramp
    maps = embedding(jnp.zeros((1, 448, 112, 3))).maps
    assert maps.shape == (1, 28, 7, 6)
    np.testing.assert_allclose(np.diff(maps[0, 6:22, 3, 0]), 0.5, atol=1e-4)


@pytest.mark.parametrize(
    ("trunk", "size", "message"),
    [
        ("vit_small_patch14_dinov2", 224, None),
        ("vit_small_patch14_dinov2", 256, "divisible by its patch size, 14"),
        ("vit_base_patch16", 250, "data.image_size to 240 or 256."),
        ("vit_base_patch16", 15, "data.image_size to 16."),
        ("resnet50", 223, None),
    ],
)
def test_image_sizes(trunk, size, message):
    config = small_config(trunk)
    config.data.image_size = size
    model = without_values(lambda rngs: models.create(config.model, rngs=rngs))
    if message is None:
        train_step.make_embed_step(model, size)
        return
    optimiser, rate = optimizer.create(config.train)
    # Before anything is read or written.
    with pytest.raises(UserError, match=message):
        train_step.make_embed_step(model, size)
    with pytest.raises(UserError, match=message):
        train_step.make_train_step(model, optimiser, rate, config)


def _names(trunk):
    """Every tensor of a published file, by torchvision's and timm's names."""
    if trunk == "resnet50":
        units = [("conv1", "bn1")]
        for layer, count in enumerate((3, 4, 6, 3), 1):
            for block in range(count):
                path = f"layer{layer}.{block}"
                units += [(f"{path}.conv{i}", f"{path}.bn{i}") for i in (1, 2, 3)]
            first = f"layer{layer}.0.downsample"
            units.append((f"{first}.0", f"{first}.1"))
        leaves = ("weight", "bias", "running_mean", "running_var")
        norms = [f"{norm}.{leaf}" for _, norm in units for leaf in leaves]
        return [f"{conv}.weight" for conv, _ in units] + norms
    names = ["cls_token", "pos_embed", *(["reg_token"] if "reg4" in trunk else [])]
    layers = ["patch_embed.proj", "norm"]
    for block in range(12):
        inner = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        layers += [f"blocks.{block}.{layer}" for layer in inner]
        if "dinov2" in trunk:
            names += [f"blocks.{block}.ls{i}.gamma" for i in (1, 2)]
    return names + [
        f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")
    ]


@pytest.mark.parametrize("trunk", NEW)
def test_names_and_paths_are_one_to_one(trunk):
    (naming,) = TRUNKS[trunk].namings
    paths = [naming.path(name) for name in _names(trunk)]
    assert len(set(paths)) == len(paths)
    assert set(paths) == set(weights._variables(TRUNKS[trunk]))


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Makes a file of ones in a trunk's shapes, some of them changed."""

    def make(trunk, **changes):
        (naming,) = TRUNKS[trunk].namings
        wanted = weights._variables(TRUNKS[trunk])
        shapes = {
            name: weights._shape_in_file(wanted[naming.path(name)])
            for name in _names(trunk)
        }
        shapes |= {name.replace("__", "."): shape for name, shape in changes.items()}
        tensors = {
            name: weight_files.Tensor(
                "float32", shape, lambda shape=shape: np.ones(shape, np.float32)
            )
            for name, shape in shapes.items()
        }
        monkeypatch.setitem(weight_files._READERS, ".pth", lambda _: tensors)
        (tmp_path / "weights.pth").touch()
        return str(tmp_path / "weights.pth")

    return make


@pytest.mark.parametrize("trunk", ["resnet50", "vit_small_patch14_reg4_dinov2"])
def test_a_file_is_that_of_its_trunk(trunk, file):
    classifier = {"fc__bias" if trunk == "resnet50" else "head__bias": (1000,)}
    found, values = weights.read(file(trunk, **classifier))
    assert found.name == trunk
    assert all((value == 1).all() for value in values.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trunk", "of", "changes", "message"),
    [
        (
            "vit_small_patch16",
            "vit_base_patch16",
            {},
            "holds a 'vit_base_patch16' and model.trunk is 'vit_small_patch16'; set "
            "--config.model.trunk=vit_base_patch16.",
        ),
        ("vit_small_patch16", "resnet50", {}, "holds a 'resnet50' and"),
        (
            "vit_small_patch16",
            "vit_small_patch16",
            {"pos_embed": (1, 577, 384)},
            "is not the float32 weights of timm's vit_small_patch16: wrong shape (1): "
            "pos_embed (1, 577, 384), not (1, 197, 384) (it is for images of another "
            "size).",
        ),
        (
            "vit_small_patch16",
            "vit_small_patch16",
            {"patch_embed__proj__weight": (384, 3, 8, 8)},
            "patches or channels of another size",
        ),
        (
            "resnet50",
            "resnet50",
            {"layer3__6__conv1__weight": (256, 1024, 1, 1)},
            "resnet50: unknown (1): layer3.6.conv1.weight.",
        ),
    ],
)
def test_files_that_do_not_fit(trunk, of, changes, message, file):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        pretrained.initialize(one_head(trunk), file(of, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (hub.Description("vit_small_patch16_224", [0.5] * 3, [0.5] * 3), None),
        (hub.Description(), None),
        (
            hub.Description("deit_small_patch16_224", None, None),
            "is timm's 'deit_small_patch16_224', which has the tensors of",
        ),
        (
            hub.Description("vit_small_patch16_224", [0.485, 0.456, 0.406], [0.5] * 3),
            "was trained on images less [0.485, 0.456, 0.406], over [0.5, 0.5, 0.5], "
            "which is not the input of 'vit_small_patch16'.",
        ),
        (
            hub.Description("vit_small_patch16_224", list(DINO), list(DINO_STD)),
            "which is not the input of 'vit_small_patch16'; set "
            "--config.model.trunk=vit_small_patch16_dino.",
        ),
    ],
)
def test_a_network_of_the_hub_is_the_one_that_it_says(told, message, monkeypatch, file):
    """DINO's and DeiT's networks have Google's tensors, for images scaled otherwise."""
    path = file("vit_small_patch16")
    monkeypatch.setattr(hub, "fetch", lambda url: pathlib.Path(path))
    monkeypatch.setattr(hub, "description", lambda url: told)
    if message is None:
        assert weights.read("hf://timm/vit")[0].name == "vit_small_patch16"
        return
    with pytest.raises(UserError, match=f"^hf://timm/vit .*{re.escape(message)}"):
        weights.read("hf://timm/vit")


def test_a_file_is_that_of_the_trunk_that_the_model_has(file):
    """Where only the input differs, a file does not say which of two it is."""
    path = file("vit_small_patch16")
    assert weights.read(path)[0].name == "vit_small_patch16"
    assert weights.read(path, "vit_small_patch16_dino")[0].name.endswith("_dino")
