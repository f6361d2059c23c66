"""What the scripts of benchmarks/ count and write down; nothing is timed."""

import sys

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


def test_lines_that_json_appends_are_rows_of_the_page(tmp_path, monkeypatch):
    abe_cases, history = load("abe_cases"), load("history")
    path = tmp_path / "history.jsonl"
    arguments = ("--cases=64:2", "--turns=1", "--seconds=0", f"--json={path}")
    monkeypatch.setattr(sys, "argv", ["train_step.py", *arguments])
    monkeypatch.setattr(abe_cases.host_memory, "use_large_pages", lambda: None)
    monkeypatch.setattr(abe_cases.side_by_side, "matrix_rate", lambda dtype: 1.0)
    monkeypatch.setattr(abe_cases.Case, "operations", lambda case: 1.0)
    monkeypatch.setattr(history, "_FILE", path)

    def nothing(case):
        return lambda count: None

    for _ in range(2):
        abe_cases.main("", ours=nothing, peer=nothing, passes=3)
    (line,) = history.newest(history.read())
    row = history.table([line | {"images/s": 9.0, "to peer": 0.5}]).splitlines()[2]
    assert row.startswith(
        "| train_step | ABE-8, 64 x 64, batch 2 | 9 images/s, 0.50 of the peer's | "
    )


def test_rows_say_before_what_they_were_measured():
    history = load("history")
    line = {"benchmark": "roofline", "what": "w", "seconds": 2.0, "before": "abc"}
    line |= {"date": "d", "commit": None, "device": "c", "jax": "j"}
    assert history.table([line]).splitlines()[2] == (
        "| roofline | w | 2 s, before abc | d |  | c, j |"
    )
