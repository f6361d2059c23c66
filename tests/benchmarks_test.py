"""What the scripts of benchmarks/ count and write down; nothing is timed."""

import jax
import jax.numpy as jnp
from benchmark import load
from flax import nnx


def test_a_repeat_of_the_product_compiles_nothing(caplog):
    retrieval = load("retrieval")
    data = retrieval.make_data("inshop", 0.1, 2.6)
    with jax.log_compiles():
        retrieval.product(data)
        assert "Compiling" in caplog.text
        caplog.clear()
        retrieval.product(data)
    assert "Compiling" not in caplog.text


class _Two(nnx.Module):
    """Two convolutions and a pooling."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.second = nnx.Conv(4, 5, (1, 1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        return nnx.max_pool(self.second(self.first(x)), (2, 2), strides=(2, 2))


def test_a_part_is_counted_forward_and_backward():
    x, kernel_1, y_1, kernel_2, y_2, pooled = 384, 108, 512, 20, 640, 160
    part = load("roofline")._part(
        "two", _Two(nnx.Rngs(0)), jnp.ones((2, 8, 8, 3)), first=True
    )
    # Nothing asks for the gradient of images.
    assert part.operations == 2 * (2 * y_1 * 27 + 3 * y_2 * 4)
    convolutions = 2 * (x + kernel_1 + y_1) + 3 * (y_1 + kernel_2 + y_2)
    assert part.bytes == 4 * (convolutions + (y_2 + pooled) + (pooled + 2 * y_2))
