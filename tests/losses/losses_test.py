"""Losses against a double loop written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from abe_jax import losses, parallel

LABELS = {
    "pairs": [0, 0, 1, 1, 2, 2, 3, 3],
    "all equal": [5] * 8,
    "all different": list(range(8)),
    "lone one": [0, 0, 0, 0, 0, 0, 0, 1],
    "shuffled": [2, 0, 1, 2, 0, 1, 2, 9],
}


def loop_contrastive(embeddings, labels, margin):
    """L_metric summed over learners: all ordered pairs, over N."""
    number, learners, _ = embeddings.shape
    total = 0.0
    for m in range(learners):
        for i in range(number):
            for j in range(number):
                distance = np.sum((embeddings[i, m] - embeddings[j, m]) ** 2)
                if labels[i] == labels[j]:
                    total += distance
                else:
                    total += max(margin - distance, 0.0)
    return total / number


def loop_divergence(embeddings, margin):
    """L_div as printed: the same image, learners p < q."""
    number, learners, _ = embeddings.shape
    total = 0.0
    for i in range(number):
        for p in range(learners):
            for q in range(p + 1, learners):
                distance = np.sum((embeddings[i, p] - embeddings[i, q]) ** 2)
                total += max(margin - distance, 0.0)
    return total


def random_embeddings(learners, seed=0, number=8, dim=6, spread=1.0):
    """Unit vectors; a spread below 1 brings them close, so that hinges are active."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, 1, dim)) + spread * rng.normal(size=(number, learners, dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("learners", [1, 2, 8])
@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_equal_to_double_loop(learners, labels, margin):
    for seed in range(5):
        x = random_embeddings(learners, seed, spread=(0.5, 1.0)[seed % 2])
        got = losses.contrastive_loss(
            jnp.asarray(x, jnp.float32), jnp.array(labels), margin=margin
        )
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(
            got, loop_contrastive(x, labels, margin), rtol=1e-6, atol=1e-6
        )
        for reduction, count in (("sum", 1), ("mean", len(x))):
            got = losses.divergence_loss(
                jnp.asarray(x, jnp.float32), margin=margin, reduction=reduction
            )
            expected = loop_divergence(x, margin) / count
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_hand_made_angles():
    # Unit vectors at 0, 60 and 180 degrees: squared distances 1, 4 and 3.
    angles = np.deg2rad([0.0, 60.0, 180.0])
    x = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], 1)[:, None], jnp.float32)
    same = losses.contrastive_loss(x, jnp.array([0, 0, 0]))
    np.testing.assert_allclose(same, 2 * (1 + 4 + 3) / 3, rtol=1e-6)
    wide = losses.contrastive_loss(x, jnp.array([0, 1, 2]), margin=3.5)
    np.testing.assert_allclose(wide, 2 * (2.5 + 0 + 0.5) / 3, rtol=1e-6)
    learners = jnp.swapaxes(x, 0, 1)
    np.testing.assert_allclose(
        losses.divergence_loss(learners, margin=3.5), 2.5 + 0 + 0.5, rtol=1e-6
    )


def test_collapse_costs_what_the_equations_say():
    x = jnp.ones((4, 3, 1), jnp.float32)
    labels = jnp.array([0, 0, 1, 1])
    np.testing.assert_allclose(losses.contrastive_loss(x, labels), 3 * 8 / 4, rtol=1e-6)
    np.testing.assert_allclose(losses.divergence_loss(x), 3.0, rtol=1e-6)


def test_half_precision_reduces_in_float32():
    x = random_embeddings(4, number=64, spread=0.3)
    labels = np.arange(64) // 2
    half = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(half.astype(jnp.float32), np.float64)
    got = losses.contrastive_loss(half, jnp.asarray(labels))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loop_contrastive(exact, labels, 1.0), rtol=1e-5)


@pytest.mark.parametrize("learners", [1, 2, 8])
def test_gradients_equal_finite_differences(learners):
    with jax.enable_x64(True):
        x = jnp.asarray(random_embeddings(learners, spread=0.7))
        labels = jnp.array(LABELS["shuffled"])

        def loss(x):
            return losses.contrastive_loss(x, labels) + losses.divergence_loss(x)

        gradient = jax.jit(jax.grad(loss))(x)
        assert gradient.dtype == jnp.float64
        evaluate = jax.jit(loss)
        step = 1e-6
        for index in np.random.default_rng(0).choice(x.size, 40):
            moved = jnp.zeros(x.size).at[index].set(step).reshape(x.shape)
            difference = (evaluate(x + moved) - evaluate(x - moved)) / (2 * step)
            np.testing.assert_allclose(
                gradient.reshape(-1)[index], difference, rtol=1e-6, atol=1e-8
            )


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("mapping", "reduction"),
    [("shard_map", "mean"), ("shard_map", "sum"), ("pmap", "mean")],
)
def test_shares_add_up_to_the_loss(devices, mapping, reduction):
    x = jnp.asarray(random_embeddings(4, number=16, spread=0.6), jnp.float32)
    labels = jnp.array([0] * 7 + [1] * 2 + [2] * 7)
    mesh = parallel.make_mesh(jax.devices()[:devices])

    def program(_, batch):
        def share(x):
            return losses.contrastive_loss(
                x, batch["label"], axis_name="data"
            ) + losses.divergence_loss(x, reduction=reduction, axis_name="data")

        value, gradient = jax.value_and_grad(share)(batch["x"])
        # The gradient of the sum over devices, with respect to the device's own rows.
        return {"share": value[None], "gradient": gradient}

    def whole(x):
        divergence = losses.divergence_loss(x, reduction=reduction)
        return losses.contrastive_loss(x, labels) + divergence

    mapped = parallel.map_over_devices(program, mesh, mapping=mapping, rows_out=True)
    batch = parallel.split_rows({"x": x, "label": labels}, mesh)
    got = mapped(parallel.replicate(jnp.zeros(()), mesh), batch)
    np.testing.assert_allclose(jnp.sum(got["share"]), whole(x), rtol=1e-6)
    np.testing.assert_allclose(
        np.asarray(got["gradient"]), jax.grad(whole)(x), rtol=1e-5, atol=1e-6
    )


def test_pair_matrix_is_local_rows_by_global_columns():
    mesh = parallel.make_mesh()

    def program(x, labels):
        return losses.contrastive_loss(x, labels, axis_name="data")[None]

    shapes = (
        jax.ShapeDtypeStruct((64, 2, 3), jnp.float32),
        jax.ShapeDtypeStruct((64,), jnp.int32),
    )
    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    text = str(jax.make_jaxpr(mapped)(*shapes))
    assert "f32[2,8,64]" in text and "f32[2,64,64]" not in text


GOOD = np.ones((4, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (GOOD[:, 0], r"float32 \[4, 3\]. One learner's"),
        (GOOD[:0], r"float32 \[0, 2, 3\]"),
        (GOOD.astype(np.int32), r"int32 \[4, 2, 3\]"),
        (GOOD.tolist(), "these are a list"),
    ],
)
def test_embeddings_of_another_shape_are_refused(embeddings, message):
    for loss in (
        losses.divergence_loss,
        lambda x: losses.contrastive_loss(x, jnp.zeros(4, jnp.int32)),
    ):
        with pytest.raises(ValueError, match=message) as error:
            loss(embeddings)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 1), np.int32), r"array \[4\].*int32 \[4, 1\]"),
        (np.zeros((), np.int32), r"int32 \[\]"),
        (np.zeros(1, np.int32), r"int32 \[1\]"),
        (np.zeros(3, np.int32), r"int32 \[3\]"),
        (np.zeros(4, np.float32), "float32"),
        ([0, 0, 1, 1], "a list"),
    ],
)
def test_labels_of_another_shape_are_refused(labels, message):
    """Broadcast, they would give another loss without a word."""
    with pytest.raises(ValueError, match=message):
        losses.contrastive_loss(jnp.asarray(GOOD[:, :1]), labels)


def test_an_unknown_reduction():
    with pytest.raises(ValueError, match="'total'; known are 'mean', 'sum'"):
        losses.divergence_loss(jnp.asarray(GOOD), reduction="total")
