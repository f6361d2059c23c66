"""Retrieval against pytorch-metric-learning, scikit-learn and PyTorch."""

import numpy as np
import pytest

# The extra 'peers' brings these; the default test run has no need of them.
torch = pytest.importorskip("torch")
neighbors = pytest.importorskip("sklearn.neighbors")
metrics = pytest.importorskip("sklearn.metrics")
accuracy_calculator = pytest.importorskip(
    "pytorch_metric_learning.utils.accuracy_calculator"
)

from abe_jax import retrieval  # noqa: E402

pytestmark = [
    pytest.mark.peers,
    # Importing faiss's SWIG wrapper beneath the calculator warns.
    pytest.mark.filterwarnings("ignore:builtin type .*:DeprecationWarning"),
]


def clusters(seed, number, classes, dim=32):
    """Tie-free unit vectors with lone labels among them."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, number)
    e = rng.normal(size=(classes, dim))[y] + 1.2 * rng.normal(size=(number, dim))
    return (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32), y


def peer(e, y, g=None, gy=None, k="max_bin_count", include=()):
    calculator = accuracy_calculator.AccuracyCalculator(
        include=include
        or ("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k=k,
        device=torch.device("cpu"),
    )
    own = g is None
    arrays = (e, y, e, y) if own else (e, y, g, gy)
    return calculator.get_accuracy(
        *(torch.from_numpy(a) for a in arrays), ref_includes_query=own
    )


@pytest.mark.parametrize(
    ("number", "classes"), [(500, 6), (800, 60), (600, 250), (1500, 400)]
)
@pytest.mark.parametrize("own", [True, False])
def test_equal_to_pytorch_metric_learning(number, classes, own):
    e, y = clusters(number, number, classes)
    half = number // 2
    if own:
        ours, theirs = retrieval.evaluate_retrieval(e, y, (1,)), peer(e, y)
    else:
        ours = retrieval.evaluate_retrieval(
            e[:half],
            y[:half],
            (1,),
            gallery_embeddings=e[half:],
            gallery_labels=y[half:],
        )
        theirs = peer(e[:half], y[:half], e[half:], y[half:])
    assert ours.recall[1] == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert ours.r_precision == pytest.approx(theirs["r_precision"], abs=1e-6)
    assert ours.map_at_r == pytest.approx(
        theirs["mean_average_precision_at_r"], abs=1e-6
    )


@pytest.mark.parametrize("own", [True, False])
def test_each_query_equal_to_pytorch_metric_learning_and_scikit_learn(own):
    e, y = clusters(7, 400, 30)
    q, qy = (e, y) if own else (e[:150], y[:150])
    g, gy = (e, y) if own else (e[150:], y[150:])
    gallery = {} if own else {"gallery_embeddings": g, "gallery_labels": gy}
    result = retrieval.evaluate_retrieval(q, qy, (1, 5), **gallery, per_query=True)
    theirs = peer(
        *((e, y) if own else (q, qy, g, gy)),
        k=len(g) - int(own),
        include=("mean_reciprocal_rank", "mean_average_precision"),
    )
    queries = result.queries
    assert queries.mean_reciprocal_rank == pytest.approx(
        theirs["mean_reciprocal_rank"], abs=1e-6
    )
    assert queries.mean_average_precision == pytest.approx(
        theirs["mean_average_precision"], abs=1e-6
    )
    sims = q.astype(np.float64) @ g.astype(np.float64).T
    for place, row in enumerate(queries.rows):
        others = np.arange(len(g)) != row if own else np.ones(len(g), bool)
        right, scores = gy[others] == qy[row], sims[row, others]
        assert queries.num_positives[place] == right.sum()
        assert queries.average_precision[place] == pytest.approx(
            metrics.average_precision_score(right, scores)
        )
        nearest = right[np.argsort(-scores)]
        assert queries.first_rank[place] == 1 + nearest.argmax()
        for k in (1, 5):
            assert queries.precision[k][place] == pytest.approx(nearest[:k].mean())


def test_neighbours_of_scikit_learn_and_pytorch():
    e, _ = clusters(1, 700, 50)
    sims, index = retrieval.top_k(e, e, 12, exclude_self=True)
    model = neighbors.NearestNeighbors(n_neighbors=12, algorithm="brute").fit(e)
    distances, found = model.kneighbors()  # without an argument: itself left out
    np.testing.assert_allclose(2 - 2 * sims, distances**2, atol=1e-5)
    assert (found == index).mean() > 0.999
    x = torch.from_numpy(e)
    product = (x @ x.T).fill_diagonal_(-torch.inf)
    values, found = product.topk(12, dim=1)
    np.testing.assert_allclose(sims, values.numpy(), atol=1e-6)
    assert (found.numpy() == index).mean() > 0.999
