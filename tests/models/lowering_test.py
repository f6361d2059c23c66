"""The lowerings of convolution and pooling equal the plain operations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abe_jax import parallel
from abe_jax.models import lowering
from abe_jax.models.lowering import parts, winograd

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True)
def _quick_compilation():
    """The tests compile for longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _random(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


# Pointwise; a dense layer, also where outputs are more than inputs; patches, of one
# part and several (also taller than wide), with strides, in the gradient only.
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad"),
    [
        ((5, 7), 1, 1, 0),
        ((5, 7), 1, 1, 1),
        ((2, 3), 5, 1, 2),
        ((4, 4), 5, 1, 3),
        ((3, 3), 3, 1, 0),
        ((5, 5), 3, 1, 1),
        ((7, 6), 3, 1, 0),
        ((9, 7), 7, 2, 3),
        ((17, 16), 3, 1, 1),
        ((8, 6), 1, 2, 0),
    ],
)
@pytest.mark.parametrize("images_at_once", [1, 2, 6])
def test_convolution_equals_the_native_one(
    size, kernel, stride, pad, images_at_once, monkeypatch
):
    values = images_at_once * size[0] * size[1] * 3 * kernel**2 // stride**2
    monkeypatch.setattr(parts, "CACHED_VALUES", values)
    maps = _random(6, *size, 3)
    weights = _random(kernel, kernel, 3, 5)
    pads = ((pad, pad), (pad, pad))

    def total(convolve, x, w):
        y = convolve(x, w, (stride, stride), pads, dimension_numbers=LAYOUT)
        return jnp.sum(jnp.sin(y)), y

    def both(convolve):
        grad = jax.grad(total, argnums=(1, 2), has_aux=True)
        return jax.jit(lambda x, w: grad(convolve, x, w))(maps, weights)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        both(lowering.conv_general_dilated),
        both(jax.lax.conv_general_dilated),
    )


# Even and odd maps, with and without padding on either side.
@pytest.mark.parametrize(
    ("size", "pads"),
    [
        ((4, 4), ((1, 1), (1, 1))),
        ((7, 5), ((1, 1), (1, 1))),
        ((6, 9), ((0, 0), (0, 0))),
        ((5, 8), ((2, 0), (0, 1))),
    ],
)
@pytest.mark.parametrize("images_at_once", [1, 2, 6])
def test_winograd_convolution_equals_the_native_one(
    size, pads, images_at_once, monkeypatch
):
    monkeypatch.setattr(
        winograd, "_TILE_VALUES", images_at_once * 4 * size[0] * size[1] * (3 + 5)
    )
    maps, weights = _random(6, *size, 3), _random(3, 3, 3, 5)

    def native(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), pads, dimension_numbers=LAYOUT
        )

    def both(convolve):
        value, pull_back = jax.vjp(convolve, maps, weights)
        return value, pull_back(jnp.sin(value))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        jax.jit(lambda: both(partial(winograd.convolution, pads)))(),
        jax.jit(lambda: both(native))(),
    )


def test_rounding_of_the_winograd_convolution_is_that_of_the_plain_one():
    maps, weights = _random(4, 14, 14, 96), _random(3, 3, 96, 64)
    pads = ((1, 1), (1, 1))
    products = [
        np.pad(np.asarray(maps, np.float64), ((0, 0), *pads, (0, 0)))[
            :, i : i + 14, j : j + 14
        ]
        @ np.asarray(weights[i, j], np.float64)
        for i in range(3)
        for j in range(3)
    ]
    exact = sum(products)
    found = jax.jit(partial(winograd.convolution, pads))(maps, weights)
    plain = jax.lax.conv_general_dilated(
        maps, weights, (1, 1), pads, dimension_numbers=LAYOUT
    )
    error = np.abs(found - exact).mean()
    assert 0 < error < 3 * np.abs(plain - exact).mean()


@pytest.mark.parametrize(
    ("size", "kernel", "channels", "stride", "taken"),
    [
        (14, 3, 64, 1, True),
        (14, 3, 63, 1, False),  # too narrow to gain
        (14, 5, 64, 1, False),
        (14, 3, 64, 2, False),
        (3, 3, 64, 1, False),  # a dense layer
    ],
)
def test_wide_3x3_convolutions_are_winograd_on_the_cpu(
    size, kernel, channels, stride, taken, monkeypatch
):
    called = []
    monkeypatch.setattr(
        winograd, "convolution", lambda pads, x, kernel: called.append(1) or x
    )
    pad = kernel // 2
    jax.eval_shape(
        partial(
            lowering.conv_general_dilated,
            window_strides=(stride, stride),
            padding=((pad, pad), (pad, pad)),
            dimension_numbers=LAYOUT,
        ),
        jnp.ones((2, size, size, channels)),
        jnp.ones((kernel, kernel, channels, channels)),
    )
    assert bool(called) == taken


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (14, 14), (20, 20)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_bfloat16_convolution_rounds_operands_and_result_only(size, kernel):
    maps = _random(4, *size, 24).astype(jnp.bfloat16)
    weights = _random(kernel, kernel, 24, 8).astype(jnp.bfloat16)
    pads = ((kernel // 2, kernel // 2),) * 2

    def cotangents(convolve, dtype):
        def total(x, w):
            y = convolve(x, w, (1, 1), pads, dimension_numbers=LAYOUT)
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        grad = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        return grad(maps.astype(dtype), weights.astype(dtype))

    ours = cotangents(lowering.conv_general_dilated, jnp.bfloat16)
    wide = cotangents(jax.lax.conv_general_dilated, jnp.float32)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wide), strict=True):
        assert a.dtype == jnp.bfloat16
        scale = float(jnp.abs(b).max())
        # A rounding to 8 bits is 2^-9; the cotangent has one too, and sums cancel.
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-7 * scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_groups_of_channels_come_first_on_every_platform(dtype):
    maps, kernel = _random(2, 4, 5, 6).astype(dtype), _random(6, 3, 7).astype(dtype)

    def total(maps, kernel):
        y = lowering.convolution_by_group(maps, kernel)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    def both():
        grad = jax.grad(total, argnums=(0, 1), has_aux=True)
        return jax.jit(lambda x, w: grad(x, w))(maps, kernel)

    (of_maps, of_kernel), y = both()
    x, w = np.float64(maps.astype(jnp.float32)), np.float64(kernel.astype(jnp.float32))
    for group in range(3):
        expected = x @ w[:, group]
        error = 2**-8 if dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.float64(y[group]), expected, error, 1e-5)
    with lowering.plain_operations():
        (plain_of_maps, plain_of_kernel), plain = both()
    error = 2**-6 if dtype == jnp.bfloat16 else 1e-5
    for ours, native in (
        (y, plain),
        (of_maps, plain_of_maps),
        (of_kernel, plain_of_kernel),
    ):
        np.testing.assert_allclose(
            ours.astype(jnp.float32), native.astype(jnp.float32), error, error
        )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_relu_and_its_gradient_are_jaxs(platform):
    x = jnp.concatenate([_random(30), jnp.zeros(2), -jnp.zeros(2)])
    for dtype in (jnp.float32, jnp.bfloat16):
        of_x = x.astype(dtype)
        with lowering.operations_of(platform):
            ours, gradient = jax.vjp(lowering.relu, of_x)
            (given,) = gradient(ours + 1)
        native, gradient = jax.vjp(jax.nn.relu, of_x)
        np.testing.assert_array_equal(ours, native)
        np.testing.assert_array_equal(given, *gradient(native + 1))
        assert ours.dtype == given.dtype == dtype


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_pooling_of_bfloat16_is_exact(platform):
    maps = _random(2, 9, 9, 3).astype(jnp.bfloat16)
    pool = partial(lowering.max_pool, window=3, stride=2)
    with lowering.operations_of(platform):
        pooled, gradient = jax.vjp(pool, maps)
        (of_maps,) = gradient(jnp.ones_like(pooled))
    assert pooled.dtype == of_maps.dtype == jnp.bfloat16
    wide, gradient = jax.vjp(pool, maps.astype(jnp.float32))
    np.testing.assert_array_equal(pooled.astype(jnp.float32), wide)
    (expected,) = gradient(jnp.ones_like(wide))
    np.testing.assert_array_equal(of_maps.astype(jnp.float32), expected)


def test_grouped_and_dilated_convolutions_are_native():
    maps, weights = _random(1, 4, 4, 4), _random(3, 3, 2, 6)
    for options in (
        {"feature_group_count": 2},
        {"feature_group_count": 2, "rhs_dilation": (2, 2)},
    ):
        arguments = (maps, weights, (1, 1), ((1, 1), (1, 1)))
        np.testing.assert_array_equal(
            lowering.conv_general_dilated(
                *arguments, dimension_numbers=LAYOUT, **options
            ),
            jax.lax.conv_general_dilated(
                *arguments, dimension_numbers=LAYOUT, **options
            ),
        )


@pytest.mark.parametrize("size", [(5, 6), (4, 4), (1, 3)])
@pytest.mark.parametrize(("window", "stride"), [(3, 1), (3, 2), (2, 2)])
def test_pooling_equals_a_loop(size, window, stride):
    maps = np.asarray(_random(2, *size, 3))
    pads = tuple(lowering.ceil_pads(s, window, stride) for s in size)
    pooled = lowering.max_pool(jnp.asarray(maps), window, stride, pads)
    # Caffe's rule: as many windows as it takes to cover every position.
    rows, columns = (max(0, -(-(s - window) // stride)) + 1 for s in size)
    assert pooled.shape == (2, rows, columns, 3)
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            part = maps[:, top : top + window, left : left + window]
            np.testing.assert_array_equal(pooled[:, i, j], part.max(axis=(1, 2)))


@pytest.mark.parametrize("size", [(5, 6), (8, 8)])
@pytest.mark.parametrize(("window", "stride", "pad"), [(3, 1, 1), (3, 2, 0), (2, 2, 0)])
@pytest.mark.parametrize(
    ("platform", "images_at_once"), [("cpu", 1), ("cpu", 2), ("gpu", 4), ("tpu", 4)]
)
def test_gradient_of_pooling_goes_to_the_first_maximum(
    size, window, stride, pad, platform, images_at_once, monkeypatch
):
    values = images_at_once * size[0] * size[1] * 3
    monkeypatch.setattr(parts, "CACHED_VALUES", values)
    # Few values, so that most windows hold equal maxima.
    maps = jax.random.randint(jax.random.key(0), (4, *size, 3), 0, 4).astype(float)
    far = [pad or lowering.ceil_pads(s, window, stride)[1] for s in size]
    pads = ((pad, far[0]), (pad, far[1]))

    def cotangents(maps):
        y = lowering.max_pool(maps, window, stride, pads)
        weights = jnp.arange(1.0, 1.0 + y.size).reshape(y.shape)
        return jnp.sum(y * weights), weights

    with lowering.operations_of(platform):
        gradient, weights = jax.jit(jax.grad(cotangents, has_aux=True))(maps)
    expected = np.zeros(maps.shape)
    for b, i, j, c in np.ndindex(*weights.shape):
        top, left = i * stride - pad, j * stride - pad
        rows = range(max(top, 0), min(top + window, size[0]))
        columns = range(max(left, 0), min(left + window, size[1]))
        places = [(row, column) for row in rows for column in columns]
        first = max(places, key=lambda place: maps[b, *place, c])
        expected[b, *first, c] += weights[b, i, j, c]
    np.testing.assert_array_equal(gradient, expected)


def _sums_of_residual_blocks(keep):
    """How often the sums of four residual blocks stand in a program of ours."""

    def chain(w, x):
        for _ in range(4):
            x = keep(jax.nn.relu(x + jnp.dot(x, w)))
        return x

    jax.config.update("jax_disable_most_optimizations", False)
    mesh = parallel.make_mesh(jax.devices()[:1])
    program = parallel.map_over_devices(chain, mesh, rows_out=True)
    square = jnp.ones((16, 16))
    return program.lower(square, square).compile().as_text().count(" maximum(")


def test_what_is_computed_once_is_not_fused_into_every_reader():
    assert _sums_of_residual_blocks(lowering.computed_once) == 4
    assert _sums_of_residual_blocks(lambda x: x) > 4
