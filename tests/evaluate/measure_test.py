"""Measuring an ensemble: rows of the table, fields of the JSON, flat metrics."""

import numpy as np
import pytest

from abe_jax import evaluate, retrieval
from abe_jax.errors import UserError


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 5)
    centres = rng.normal(size=(10, 3, 4))
    embeddings = centres[labels] + 0.8 * rng.normal(size=(50, 3, 4))
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    embeddings = embeddings.astype(np.float32)
    return embeddings, labels, evaluate.measure(embeddings, labels, (1, 4))


def distances_recall(distances, labels, k):
    """Recall@K from squared distances, without the module under test."""
    distances = distances.copy()
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :k]
    return float(np.mean((labels[nearest] == labels[:, None]).any(1)))


def test_ensemble_distance_is_the_sum_over_learners(measured):
    embeddings, labels, result = measured
    gaps = embeddings[:, None] - embeddings[None]
    by_learner = np.sum(gaps.astype(np.float64) ** 2, axis=-1)
    for k in (1, 4):
        expected = distances_recall(by_learner.sum(-1), labels, k)
        assert result["recall"][str(k)] == pytest.approx(expected)
        learners = [distances_recall(by_learner[..., m], labels, k) for m in range(3)]
        found = [learner["recall"][str(k)] for learner in result["learners"]]
        assert found == pytest.approx(learners)
        mean = result["mean_learner"]["recall"][str(k)]
        assert mean == pytest.approx(np.mean(learners))


def test_numbers_of_queries(measured):
    result = measured[2]
    assert (result["num_queries"], result["num_gallery"]) == (50, 50)
    assert result["num_lone_queries"] == 0


def test_flat_metrics_and_table(measured):
    metrics = evaluate.scalars(measured[2])
    diversity = {name for name in metrics if name.startswith("eval/diversity/")}
    assert set(metrics) - diversity == {
        f"{part}/{figure}"
        for part in (
            "eval",
            "eval/mean_learner",
            *(f"eval/learner_{m}" for m in range(3)),
        )
        for figure in ("recall@1", "recall@4", "map_at_r")
    }
    assert all(isinstance(value, float) for value in metrics.values())
    table = evaluate.table({"untrained": metrics, "step 5": metrics}, 3)
    *lines, empty, last = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["R@1", "R@4", "MAP@R"] * 2
    assert [line[:12].strip() for line in lines[2:]] == [
        *("learner 0", "learner 1", "learner 2"),
        *("mean learner", "ensemble"),
    ]
    assert lines[-1].split()[1] == f"{metrics['eval/recall@1']:.3f}"
    gain = metrics["eval/recall@1"] - metrics["eval/mean_learner/recall@1"]
    assert not empty and f"gains {100 * gain:+.1f} points" in last


def test_gain_is_of_recall_at_1_whatever_is_asked_for(measured):
    embeddings, labels, result = measured
    other = evaluate.measure(embeddings, labels, (4,))
    assert other["diversity"] == result["diversity"]
    assert list(other["recall"]) == ["4"]


def test_a_new_metric_appears_everywhere_by_itself(measured, monkeypatch):
    metric = evaluate.Metric("R-P", lambda result: result.r_precision)
    monkeypatch.setitem(evaluate.METRICS, "r_precision", metric)
    embeddings, labels, _ = measured
    result = evaluate.measure(embeddings, labels, (1,))
    assert 0 < result["mean_learner"]["r_precision"] < result["r_precision"] < 1
    metrics = evaluate.scalars(result)
    assert metrics["eval/learner_2/r_precision"] > 0
    table = evaluate.table({"step 5": metrics}, 3)
    assert table.splitlines()[1].split() == ["R@1", "MAP@R", "R-P"]


def test_non_finite_embedding_is_the_users_to_know(measured):
    embeddings, labels, _ = measured
    broken = embeddings.copy()
    broken[7, 1, 2] = np.nan
    with pytest.raises(UserError, match="7"):
        evaluate.measure(broken, labels, (1,))


def test_all_lone_queries_are_told(measured):
    embeddings, _, _ = measured
    with pytest.raises(UserError, match="no query has a positive"):
        evaluate.measure(embeddings, np.arange(50), (1,))


def test_a_gallery_of_its_own_is_searched_and_nothing_is_left_out(measured):
    embeddings, labels, _ = measured
    queries, gallery = slice(0, 50, 2), slice(1, 50, 2)
    result = evaluate.measure(
        embeddings[queries],
        labels[queries],
        (1, 4),
        (embeddings[gallery], labels[gallery]),
    )
    assert (result["num_queries"], result["num_gallery"]) == (25, 25)
    gaps = embeddings[queries, None] - embeddings[None, gallery]
    by_learner = np.sum(gaps.astype(np.float64) ** 2, axis=-1)
    same = labels[queries, None] == labels[None, gallery]
    for k in (1, 4):
        for distances, found in [
            (by_learner.sum(-1), result),
            *((by_learner[..., m], result["learners"][m]) for m in range(3)),
        ]:
            nearest = np.argsort(distances, axis=1)[:, :k]
            expected = np.take_along_axis(same, nearest, axis=1).any(1).mean()
            assert found["recall"][str(k)] == pytest.approx(expected)


def test_is_what_retrieval_says(measured):
    embeddings, labels, result = measured
    flat = embeddings.reshape(50, -1)
    assert result["map_at_r"] == retrieval.map_at_r(flat, labels)


def test_queries_that_are_the_gallery_are_noticed(measured, caplog):
    embeddings, labels, _ = measured
    evaluate.measure(embeddings, labels, (1,), (embeddings, labels))
    assert "every query has its like" in caplog.text
    caplog.clear()
    evaluate.measure(embeddings, labels, (1,), (embeddings[::2], labels[::2]))
    evaluate.measure(embeddings, labels, (1,))
    assert not caplog.text


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 0, 0], "one class is evaluated: every figure is 1"),
        ([0, 0, 1, 1], "compared with 3 images: Recall@4 is 1, whatever the model"),
    ],
)
def test_figures_that_are_certain_are_told(labels, message, caplog):
    embeddings = np.eye(4, dtype=np.float32)[:, None]
    result = evaluate.measure(embeddings, np.array(labels), (1, 2, 4))
    assert message in caplog.text
    assert result["recall"]["4"] == 1.0


def test_figures_that_are_not_certain_are_not_told(measured, caplog):
    embeddings, labels, _ = measured
    evaluate.measure(embeddings, labels, (1, 48))
    assert not caplog.text
