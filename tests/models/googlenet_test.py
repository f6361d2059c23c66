"""GoogLeNet's parts against loops and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from abe_jax.errors import UserError
from abe_jax.models import googlenet, initializers
from abe_jax.models.batch_norm import DATA_AXIS, BatchNorm
from abe_jax.models.shapes import without_values


@pytest.fixture(autouse=True)
def _quick_compilation():
    """The tests compile for longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_local_response_norm_equals_a_loop():
    x = 30 * np.asarray(jax.random.normal(jax.random.key(0), (2, 3, 3, 7)))
    expected = np.empty_like(x)
    for c in range(7):
        near = x[..., max(0, c - 2) : c + 3]
        total = np.square(near).sum(axis=-1)
        expected[..., c] = x[..., c] / (1 + 1e-4 / 5 * total) ** 0.75
    result = googlenet.local_response_norm(jnp.asarray(x))
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_the_gradient_of_local_response_norm_is_that_of_its_formula():
    """It is written by hand: only the maps are kept for it."""
    with jax.enable_x64(True):
        x = 90 * jax.random.normal(jax.random.key(0), (2, 3, 3, 7), jnp.float64)
        weights = jax.random.normal(jax.random.key(1), x.shape, jnp.float64)

        def by_formula(x):
            padded = jnp.pad(jnp.square(x), (*3 * [(0, 0)], (2, 2)))
            total = sum(padded[..., i : i + 7] for i in range(5))
            return x / (1 + 1e-4 / 5 * total) ** 0.75

        def gradient(norm):
            return np.asarray(jax.grad(lambda x: jnp.sum(weights * norm(x)))(x))

        expected = gradient(by_formula)
        found = gradient(googlenet.local_response_norm)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert abs(expected - np.asarray(weights)).max() > 0.1  # it is not the identity's


def test_what_a_trunk_by_itself_cannot_be():
    with pytest.raises(UserError, match="^form is 'resnet50'; known are 'googlenet', "):
        googlenet.GoogLeNet("resnet50", rngs=nnx.Rngs(0))
    narrow = without_values(
        lambda rngs: googlenet.GoogLeNet(googlenet.BVLC, width=0.5, rngs=rngs)
    )
    assert narrow.spatial.conv1.conv.kernel.shape == (7, 7, 3, 32)


def test_preprocessing_of_the_forms():
    images = jnp.asarray([[[[0, 51, 255]]]], jnp.uint8)
    bvlc = googlenet.BVLC.preprocessing(images)
    np.testing.assert_allclose(bvlc[0, 0, 0], [151, -66, -123])  # BGR minus its mean
    bn = googlenet.TORCHVISION.preprocessing(images)
    np.testing.assert_allclose(bn[0, 0, 0], [-1, -0.6, 1], rtol=1e-6)


@pytest.mark.parametrize("trunk", ["googlenet", "googlenet_bn"])
@pytest.mark.parametrize(("size", "maps"), [(224, 14), (222, 13), (64, 4), (50, 3)])
def test_pooling_rounds_up(trunk, size, maps):
    model = without_values(lambda rngs: googlenet.GoogLeNet(trunk, rngs=rngs))
    graphdef, state = nnx.split(model)

    def run(state, images):
        trunk = nnx.merge(graphdef, state, copy=True)
        spatial = trunk.spatial(images)
        return spatial, trunk.global_features(spatial)

    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    spatial, features = jax.eval_shape(run, state, images)
    assert spatial.shape == (2, maps, maps, 480)
    assert features.shape == (2, 1024)


def _train(layer, x, devices):
    """Output and new variables of a layer, the batch spread over some devices."""
    graphdef, state = nnx.split(nnx.view(layer, use_running_average=False))
    mesh = jax.make_mesh(
        (devices,),
        (DATA_AXIS,),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )

    def step(state, x):
        layer = nnx.merge(graphdef, state, copy=True)
        return layer(x), nnx.to_pure_dict(nnx.state(layer))

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(DATA_AXIS)),
        out_specs=(P(DATA_AXIS), P()),
        check_vma=False,
    )
    return jax.jit(mapped)(state, x)


@pytest.mark.parametrize("devices", [1, 2])
def test_batch_norm_trains_on_the_global_batch(devices):
    layer = BatchNorm(5, frozen=False, rngs=nnx.Rngs(0))
    x = 3 * jax.random.normal(jax.random.key(1), (2, 2, 1, 5)) + 1
    y, after = _train(layer, x, devices)
    plain = np.asarray(x).reshape(4, 5)
    scaled = (np.asarray(x) - plain.mean(0)) / np.sqrt(plain.var(0) + 1e-3)
    np.testing.assert_allclose(y, scaled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after["mean"], 0.1 * plain.mean(0), rtol=1e-5)
    # Unbiased: with 4 positions it is a third more than the batch's own.
    expected = 0.9 + 0.1 * plain.var(0, ddof=1)
    np.testing.assert_allclose(after["var"], expected, rtol=1e-5)


def test_stacked_batch_norms_train_each_on_its_own():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return BatchNorm(5, frozen=False, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self):
            self.norms = make(nnx.Rngs(0))

        def __call__(self, x):
            return nnx.vmap(lambda norm, x: norm(x), in_axes=(0, 1), out_axes=1)(
                self.norms, x
            )

    x = 3 * jax.random.normal(jax.random.key(1), (4, 2, 3, 5)) + 1
    _, after = _train(Stack(), x, devices=2)
    for i in range(2):
        plain = np.asarray(x)[:, i].reshape(12, 5)
        mean, var = after["norms"]["mean"][i], after["norms"]["var"][i]
        np.testing.assert_allclose(mean, 0.1 * plain.mean(0), rtol=1e-5)
        np.testing.assert_allclose(var, 0.9 + 0.1 * plain.var(0, ddof=1), rtol=1e-5)


def test_frozen_batch_norm_keeps_its_averages_and_trains_its_scale():
    layer = BatchNorm(3, frozen=True, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.asarray([1.0, 2.0, 3.0])
    layer.var[...] = jnp.asarray([4.0, 1.0, 0.25])
    x = jax.random.normal(jax.random.key(1), (2, 3, 3, 3))
    # Outside of any mapped axis: it reads nothing but its own averages.
    y = layer(x)
    scaled = (np.asarray(x) - [1, 2, 3]) / np.sqrt(np.asarray([4, 1, 0.25]) + 1e-3)
    np.testing.assert_allclose(y, scaled, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(layer.mean[...], [1, 2, 3])
    np.testing.assert_array_equal(layer.var[...], [4, 1, 0.25])
    gradient = nnx.grad(lambda layer: jnp.sum(layer(x) ** 3))(layer)
    assert (np.asarray(gradient["scale"][...]) != 0).all()


def test_initial_weights_have_the_published_spread():
    key, shape = jax.random.key(0), (3, 3, 64, 128)
    he = np.asarray(initializers.he_normal(key, shape, jnp.float32))
    deviation = np.sqrt(2 / (3 * 3 * 64))
    np.testing.assert_allclose(he.std(), deviation, rtol=0.02)
    assert abs(he).max() < 2 * deviation / 0.87
    glorot = np.asarray(initializers.glorot_uniform(key, (256, 512), jnp.float32))
    limit = np.sqrt(6 / (256 + 512))
    np.testing.assert_allclose(glorot.std(), limit / np.sqrt(3), rtol=0.02)
    assert limit * 0.99 < abs(glorot).max() <= limit


def test_initial_weights_are_the_same_traced():
    keys = jax.random.split(jax.random.key(3), 4)

    def draw(key):
        return initializers.he_normal(key, (2, 5), jnp.float32)

    eager = np.stack([draw(key) for key in keys])
    assert len(np.unique(eager)) == eager.size
    np.testing.assert_array_equal(jax.jit(draw)(keys[0]), eager[0])
    np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(keys), eager)
