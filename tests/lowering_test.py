"""The lowerings of convolution and pooling equal the plain operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abe_jax.models import lowering

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True)
def _quick_compilation():
    """The tests compile for longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _random(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


# Pointwise, patches at small maps (also taller than wide), and the native fall-through.
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad"),
    [
        ((5, 7), 1, 1, 0),
        ((2, 3), 5, 1, 2),
        ((5, 5), 3, 1, 1),
        ((9, 7), 7, 2, 3),
    ],
)
def test_convolution_equals_the_native_one(size, kernel, stride, pad):
    maps = _random(2, *size, 3)
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


def test_gradient_of_pooling_goes_to_the_maximum():
    maps = _random(1, 5, 5, 1)
    gradient = jax.grad(lambda x: lowering.max_pool(x, 3, 2).sum())(maps)
    expected = np.zeros((5, 5))
    plain = np.asarray(maps)[0, :, :, 0]
    for i in (0, 2):
        for j in (0, 2):
            part = plain[i : i + 3, j : j + 3]
            row, column = np.unravel_index(part.argmax(), part.shape)
            expected[i + row, j + column] += 1
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)
