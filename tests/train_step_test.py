"""One step on 1, 2, 4 and 8 devices, mapped in two ways, is the same step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from short import SHORT

from abe_jax import losses, models, optimizer, parallel, train_step
from abe_jax.errors import UserError
from abe_jax.models.trunks import TRUNKS
from configs import quickstart

BATCH = 16
SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def _short_trunks():
    with pytest.MonkeyPatch.context() as patch:
        for name, trunk in SHORT.items():
            patch.setitem(TRUNKS, name, trunk)
        yield


def small_config(
    trunk="short_bn",
    chunks=1,
    frozen=False,
    augmented=True,
    rematerialize=False,
    in_turn=False,
    loss="contrastive",
    part="all",
    name="abe",
    learners=2,
):
    config = quickstart.get_config()
    config.model.update(trunk=trunk, num_learners=learners, embedding_dim=8, width=0.1)
    config.model.update(attention_blocks=1, freeze_batch_norm=frozen)
    config.model.update(rematerialize=rematerialize, train=part, name=name)
    config.model.learners_in_turn = in_turn
    config.loss.name = loss
    config.data.update(load_size=SIZE, image_size=SIZE)
    # Without momentum the update is the gradient times the rate.
    config.train.update(
        optimizer="sgd", momentum=0.0, learning_rate=1.0, warmup_steps=0
    )
    config.train.update(weight_decay=0.0, batch_size=BATCH, steps=10, chunks=chunks)
    if not augmented:
        config.augment.update(crop_area=(1.0, 1.0), crop_aspect=1.0)
        for name in ("flip", "brightness", "contrast", "saturation", "hue", "grey"):
            config.augment[name] = 0.0
        config.augment.erase = 0.0
    return config


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    # Unequal class counts on every device.
    labels = np.sort(rng.choice([0, 0, 0, 1, 2, 2], BATCH)).astype(np.int32)
    images = rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
    return {"image": images, "label": labels}


@functools.cache
def stepped(trunk, devices, mapping, *, wide=True, **changes):
    """Gradient, new averages and metrics of a step; `wide` computes in float64."""
    config = small_config(trunk, **changes)
    with jax.enable_x64(wide):
        mesh = parallel.make_mesh(jax.devices()[:devices])
        model = models.create(config.model, rngs=nnx.Rngs(0))
        optimiser, rate = optimizer.create(config.train)
        take_step = parallel.map_over_devices(
            train_step.make_train_step(model, optimiser, rate, config),
            mesh,
            mapping=mapping,
            donate_state=True,
        )
        own = losses.initial_parameters(
            config.loss, jax.random.key(1), num_classes=3, num_learners=2, dim=4
        )
        own = jax.tree.map(lambda x: x.astype(np.float32), own)
        before = train_step.initial_state(model, optimiser, own, config.model.train)
        if wide:
            before = jax.tree.map(
                lambda x: x.astype(np.float64) if x.dtype == np.float32 else x,
                jax.device_get(before),
            )
        params = jax.tree.map(np.array, (before.params, before.loss_params))
        state, metrics = take_step(
            parallel.replicate(before, mesh), parallel.split_rows(batch_of(), mesh)
        )
        after = jax.device_get(state)
    assert after.step == 1
    gradient, of_loss = jax.tree.map(
        lambda a, b: a - b, params, (after.params, after.loss_params)
    )
    return gradient | of_loss, after.model_state, jax.device_get(metrics)


def assert_equal_trees(got, expected, rtol):
    """Each leaf within rtol of its largest value, or of a hundredth of the largest."""
    flat = jax.tree_util.tree_leaves_with_path(expected)
    largest = max(float(np.abs(leaf).max()) for _, leaf in flat)
    for (path, want), have in zip(flat, jax.tree.leaves(got), strict=True):
        # The smallest net has channels whose gradients are zero, or cancel nearly: what
        # is left of sums of large terms has their rounding.
        scale = max(float(np.abs(want).max()), 1e-2 * largest)
        error = float(np.abs(have - want).max()) / scale
        assert error <= rtol, f"{jax.tree_util.keystr(path)}: {error}"


def slow(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("trunk", "mapping", "devices", "chunks", "frozen"),
    [
        ("short", "shard_map", 8, 2, False),
        slow("short", "shard_map", 2, 4, False),
        slow("short_bn", "shard_map", 8, 1, False),
        slow("short_bn", "pmap", 8, 1, False),
        slow("short_bn", "pmap", 4, 4, True),
    ],
)
def test_equal_on_any_number_of_devices(trunk, mapping, devices, chunks, frozen):
    """Loss, gradient of every parameter and batch statistics, in float64."""
    own = {"frozen": True} if frozen else {}  # as other tests ask for it: kept once
    gradient, averages, metrics = stepped(trunk, 1, "shard_map", **own)
    got, got_averages, got_metrics = stepped(
        trunk, devices, mapping, chunks=chunks, **own
    )
    assert gradient["head"]["kernel"].dtype == metrics["loss"].dtype == np.float64
    for name in ("loss", "contrastive", "divergence", "gradient_norm"):
        np.testing.assert_allclose(got_metrics[name], metrics[name], rtol=1e-12)
    assert_equal_trees(got, gradient, rtol=1e-12)
    if averages:
        assert_equal_trees(got_averages, averages, rtol=1e-12)


@pytest.mark.slow
def test_microbatches_of_a_frozen_s_and_a_loss_with_parameters_change_nothing():
    fields = {"loss": "proxy_anchor", "part": "heads"}
    gradient, _, metrics = stepped("googlenet", 1, "shard_map", **fields)
    got, _, found = stepped("googlenet", 4, "shard_map", chunks=2, **fields)
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-12)
    assert not any(map(np.any, jax.tree.leaves(gradient["spatial"])))
    assert np.any(gradient["proxies"])
    assert_equal_trees(got, gradient, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trunk", "option", "measured", "most"),
    [
        # Of few blocks, whose maps are kept, little is saved.
        ("short_bn", "rematerialize", {"trunk": "googlenet_bn"}, 0.75),
        ("short", "in_turn", {"trunk": "short", "learners": 8}, 0.85),
    ],
)
def test_computing_again_changes_memory_only(trunk, option, measured, most):
    gradient, averages, metrics = stepped(trunk, 1, "shard_map")
    options = {"rematerialize": True, option: True}  # each block of S and attention too
    got, got_averages, got_metrics = stepped(trunk, 2, "shard_map", **options)
    np.testing.assert_allclose(got_metrics["loss"], metrics["loss"], rtol=1e-12)
    assert_equal_trees(got, gradient, rtol=1e-12)
    if averages:
        assert_equal_trees(got_averages, averages, rtol=1e-12)
    less, usual = (
        temporary_memory(**measured, augmented=False, **{option: o})
        for o in (True, False)
    )
    assert less < most * usual


@pytest.mark.slow
def test_heads_are_computed_again_alike():
    gradient, averages, _ = stepped("short_bn", 1, "shard_map", name="m_heads")
    again = {"name": "m_heads", "rematerialize": True}
    got, got_averages, _ = stepped("short_bn", 2, "shard_map", **again)
    assert_equal_trees(got, gradient, rtol=1e-12)
    assert_equal_trees(got_averages, averages, rtol=1e-12)


def temporary_memory(trunk, **changes):
    """Bytes that one device's step needs beside its inputs and outputs."""
    config = small_config(trunk, **changes)
    mesh = parallel.make_mesh(jax.devices()[:1])
    model = models.create(config.model, rngs=nnx.Rngs(0))
    optimiser, rate = optimizer.create(config.train)
    take_step = parallel.map_over_devices(
        train_step.make_train_step(model, optimiser, rate, config), mesh
    )
    state = train_step.initial_state(model, optimiser)
    compiled = take_step.lower(state, batch_of()).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_float32_on_eight_devices_is_as_exact_as_on_one():
    """Rounding differs, and ReLUs near zero flip; not more than on one device."""
    trunk = "short"
    # Unaugmented, as float32 and float64 draw different random numbers.
    exact, _, exact_metrics = stepped(trunk, 1, "shard_map", augmented=False)
    errors = {}
    for devices in (1, 8):
        got, _, metrics = stepped(
            trunk, devices, "shard_map", wide=False, augmented=False
        )
        np.testing.assert_allclose(metrics["loss"], exact_metrics["loss"], rtol=1e-5)
        difference = jax.tree.map(lambda a, b: a - b, got, exact)
        errors[devices] = float(optax.tree.norm(difference) / optax.tree.norm(exact))
    assert errors[8] <= 4 * errors[1], errors


def test_batch_norm_cannot_be_chunked():
    config = small_config("short_bn", chunks=2)
    model = models.create(config.model, rngs=nnx.Rngs(0))
    optimiser, rate = optimizer.create(config.train)
    with pytest.raises(UserError, match="statistics of the whole batch .*chunks=1"):
        train_step.make_train_step(model, optimiser, rate, config)


@pytest.mark.parametrize(
    ("batch_size", "chunks", "message"),
    [
        (
            12,
            1,
            r"batch_size = 12 is not divisible by 8 device\(s\); "
            "make it a multiple of 8",
        ),
        (
            24,
            2,
            r"24 is not divisible by 8 device\(s\), 2 chunks each; .*multiple of 16",
        ),
    ],
)
def test_batches_that_cannot_be_shared(batch_size, chunks, message):
    with pytest.raises(UserError, match=message):
        parallel.require_divisible(batch_size, parallel.make_mesh(), chunks)


@pytest.mark.slow
def test_a_local_loss_would_fail(monkeypatch):
    """The comparison above sees the classic mistake: pairs of one device only."""
    whole = losses.contrastive_loss

    def local(embeddings, labels, *, margin, axis_name):
        devices = jax.lax.axis_size(axis_name)
        return whole(embeddings, labels, margin=margin) / devices

    monkeypatch.setattr(losses, "contrastive_loss", local)
    gradient, _, metrics = stepped.__wrapped__("short", 2, "shard_map")
    want_gradient, _, want = stepped("short", 1, "shard_map")
    assert abs(metrics["loss"] - want["loss"]) > 1e-2 * want["loss"]
    with pytest.raises(AssertionError):
        assert_equal_trees(gradient, want_gradient, rtol=1e-2)


def test_gradient_is_that_of_the_loss_over_the_batch():
    """Four devices' step against a plain gradient written without any axis."""
    got, _, metrics = stepped("short", 4, "shard_map", augmented=False)
    batch = batch_of()
    with jax.enable_x64(True):
        model = models.create(small_config("short").model, rngs=nnx.Rngs(0))
        graphdef, params, _ = nnx.split(model, nnx.Param, ...)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)

        def loss(params):
            net = nnx.merge(graphdef, params, nnx.State({}), copy=True)
            images = jnp.asarray(batch["image"], jnp.float64)
            embeddings = net(net.preprocessing(images))
            labels = jnp.asarray(batch["label"])
            return losses.contrastive_loss(embeddings, labels) + losses.divergence_loss(
                embeddings
            )

        value, gradient = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-9)
    assert_equal_trees(got, nnx.to_pure_dict(gradient), rtol=1e-6)


@pytest.mark.slow
def test_metrics_are_complete():
    _, _, metrics = stepped("short", 1, "shard_map")
    assert set(metrics) == {
        "loss",
        "contrastive",
        "divergence",
        "gradient_norm",
        "learning_rate",
    }
    total = metrics["contrastive"] + metrics["divergence"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)


def test_new_layers_learn_faster():
    config = small_config().train
    params = {
        "model": {
            "head": {"kernel": jnp.ones((2, 2))},
            "spatial": {"kernel": jnp.ones((2, 2))},
        },
        "loss": {"proxies": jnp.ones((2, 2))},
    }
    gradients = jax.tree.map(jnp.ones_like, params)
    config.update(new_layer_factor=10.0, loss_factor=100.0)
    optimiser, _ = optimizer.create(config)
    updates, _ = optimiser.update(gradients, optimiser.init(params), params)
    np.testing.assert_allclose(updates["model"]["head"]["kernel"], -10.0)
    np.testing.assert_allclose(updates["model"]["spatial"]["kernel"], -1.0)
    np.testing.assert_allclose(updates["loss"]["proxies"], -100.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_leaves_biases_alone(name):
    config = small_config().train
    config.update(optimizer=name, weight_decay=0.1)
    params = {"model": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}}
    gradients = jax.tree.map(jnp.zeros_like, params)
    optimiser, _ = optimizer.create(config)
    updates, _ = optimiser.update(gradients, optimiser.init(params), params)
    np.testing.assert_allclose(updates["model"]["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["model"]["bias"], 0.0)


def test_clipping_bounds_the_gradient():
    config = small_config().train
    config.clip_norm = 0.5
    optimiser, _ = optimizer.create(config)
    params = {"model": {"kernel": jnp.zeros((3, 3))}}
    gradients = {"model": {"kernel": jnp.full((3, 3), 7.0)}}
    updates, _ = optimiser.update(gradients, optimiser.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


def test_schedules():
    config = small_config().train
    config.update(learning_rate=1.0, warmup_steps=10, steps=110, schedule="cosine")
    _, rate = optimizer.create(config)
    np.testing.assert_allclose(
        [rate(s) for s in (0, 9, 10, 60, 110)], [0.1, 1, 1, 0.5, 0], atol=1e-6
    )
    config.update(schedule="step", warmup_steps=0, decay_every=50, decay_rate=0.1)
    _, rate = optimizer.create(config)
    np.testing.assert_allclose([rate(s) for s in (0, 49, 50, 100)], [1, 1, 0.1, 0.01])
    # Compiled, a division becomes a product with an inverse that is not exact.
    config.update(decay_every=1700)
    _, rate = optimizer.create(config)
    steps = jnp.array([0, 1699, 1700, 3399, 3400])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(rate))(steps), [1, 1, 0.1, 0.1, 0.01], rtol=1e-5
    )
    config.update(schedule="constant")
    _, rate = optimizer.create(config)
    np.testing.assert_allclose([rate(s) for s in (0, 100)], [1, 1])
