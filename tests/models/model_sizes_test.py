"""Every digit of the paper's table of sizes (design: derived, not measured)."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from benchmark import load
from command_line import ROOT
from flax import nnx
from ml_collections import ConfigDict

from abe_jax import models
from abe_jax.models import lowering
from abe_jax.models.shapes import without_values

# Parameters / 10^7 and multiply-adds / 10^9.
TABLE = """
1-head^512  0.65 1.58
2-heads^512 1.18 2.25
4-heads^512 2.24 3.60
8-heads^512 4.36 6.28
ABE-1^512   0.97 2.21
ABE-2^512   0.98 2.96
ABE-4^512   1.05 4.46
ABE-8^512   1.20 7.46
ABE-1^64    0.92 2.21
ABE-2^128   0.96 2.96
ABE-4^256   1.04 4.46
"""


@pytest.fixture(scope="module")
def model_sizes():
    return load("model_sizes")


@pytest.mark.slow
def test_the_eleven_rows(model_sizes, capsys):
    model_sizes.main()
    printed = capsys.readouterr().out.splitlines()[1:]
    wanted = TABLE.strip().splitlines()
    assert [row.split() for row in printed] == [row.split() for row in wanted]


@pytest.mark.slow
def test_the_page_has_the_sizes_of_all_trunks(model_sizes):
    page = (ROOT / "docs" / "models.md").read_text()
    assert model_sizes.trunk_table() in page


def test_the_models_of_the_quickstart(model_sizes, capsys):
    """Narrow, at 64 x 64: ABE-4 costs 2.47 of its 1-heads; the paper's, 2.82."""
    model_sizes.main(["--config=quickstart"])
    assert [row.split() for row in capsys.readouterr().out.splitlines()[1:]] == [
        ["1-head^128", "0.39", "9.48"],
        ["4-heads^128", "1.33", "19.16"],
        ["ABE-4^128", "0.63", "23.40"],
    ]


def test_one_head_against_the_published_count(model_sizes):
    # BVLC's GoogLeNet has 6,998,552 parameters; the embedding replaces its classifier.
    parameters, _ = model_sizes.size("one_head", 1, 512)
    assert parameters == 6_998_552 - (1024 * 1000 + 1000) + (1024 * 512 + 512)


def test_multiply_adds_by_hand(model_sizes):
    kernel = jnp.ones((5, 5, 3, 7))

    def program(x):
        maps = lowering.conv_general_dilated(
            x,
            kernel,
            (2, 2),
            ((2, 2), (2, 2)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return maps.mean(axis=(1, 2)) @ jnp.ones((7, 11))

    jaxpr = model_sizes.traced(jax.jit(program), jnp.ones((2, 9, 9, 3)))
    assert model_sizes.multiply_adds(jaxpr) == 2 * 5 * 5 * 7 * (5 * 5 * 3) + 2 * 7 * 11


def test_multiply_adds_without_padding_are_those_xla_counts(model_sizes):
    maps, kernel = jnp.ones((2, 9, 11, 3)), jnp.ones((5, 3, 3, 7))

    def all_three(maps, kernel, cotangents):
        convolution = partial(
            jax.lax.conv_general_dilated,
            window_strides=(2, 1),
            padding=((2, 1), (0, 3)),
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        outputs, gradients = jax.vjp(convolution, maps, kernel)
        return outputs, gradients(cotangents)

    arguments = maps, kernel, jnp.ones((2, 4, 10, 7))
    counted = jax.jit(all_three).lower(*arguments).cost_analysis()["flops"]
    program = model_sizes.traced(all_three, *arguments)
    assert 2 * model_sizes.multiply_adds(program, padding=False) == counted
    assert 2 * model_sizes.multiply_adds(program) > counted


def test_learners_in_turn_compute_g_to_4d_again_and_nothing_else(model_sizes):
    config = ConfigDict({"name": "abe", "trunk": "googlenet", "width": 0.125})
    config.update(num_learners=4, embedding_dim=32)
    maps = jax.ShapeDtypeStruct((2, 5, 5, 60), jnp.float32)

    def counted(in_turn, forward=None):
        config.learners_in_turn = in_turn
        model = without_values(lambda rngs: models.create(config, rngs=rngs))
        graphdef, state = nnx.split(model)

        def run(state, maps):
            model = nnx.merge(graphdef, state, copy=True)
            return (forward or type(model).from_spatial)(model, maps)

        program = run if forward else jax.grad(lambda *args: run(*args).sum(), (0, 1))
        return model_sizes.multiply_adds(model_sizes.traced(program, state, maps))

    def to_4d(model, maps):
        for stage in ("4a", "4b", "4c", "4d"):
            maps = model.global_features._run(stage, maps)
        return maps

    assert counted(True) - counted(False) == 4 * counted(False, to_4d)
