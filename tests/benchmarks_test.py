"""What the scripts of benchmarks/ count and write down; nothing is timed."""

import jax
from benchmark import load


def test_a_repeat_of_the_product_compiles_nothing(caplog):
    retrieval = load("retrieval")
    data = retrieval.make_data("inshop", 0.1, 2.6)
    with jax.log_compiles():
        retrieval.product(data)
        assert "Compiling" in caplog.text
        caplog.clear()
        retrieval.product(data)
    assert "Compiling" not in caplog.text
