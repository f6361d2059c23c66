"""Multi-similarity and Proxy-Anchor: loops, devices, and a run with proxies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_test import LABELS, random_embeddings
from tiny import replace_models
from train_test import small_config

import abe_jax
from abe_jax import losses, parallel, train
from abe_jax.errors import UserError
from abe_jax.workdir import checkpoints

CLASSES = 10
NAMES = ("multi_similarity", "proxy_anchor")


def loop_multi_similarity(rows, labels, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1):
    """One learner, `rows` [B, d]: equations 9, 10 and 13 of the paper."""
    similarities = rows @ rows.T
    total = 0.0
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        positive = [similarities[i, j] for j in others if labels[j] == labels[i]]
        negative = [similarities[i, j] for j in others if labels[j] != labels[i]]
        hard = [s for s in positive if negative and s < max(negative) + epsilon]
        near = [s for s in negative if positive and s > min(positive) - epsilon]
        total += np.log1p(sum(np.exp(-alpha * (s - base)) for s in hard)) / alpha
        total += np.log1p(sum(np.exp(beta * (s - base)) for s in near)) / beta
    return total / len(rows)


def loop_proxy_anchor(rows, labels, proxies, margin=0.1, alpha=32.0):
    """One learner, `proxies` [C, d]: equation 4 of the paper."""
    proxies = proxies / np.linalg.norm(proxies, axis=1, keepdims=True)
    pulled = pushed = 0.0
    for number, proxy in enumerate(proxies):
        similarities = rows @ proxy
        same = np.asarray(labels) == number
        if same.any():
            exponents = -alpha * (similarities[same] - margin)
            pulled += np.log1p(np.exp(exponents).sum())
        pushed += np.log1p(np.exp(alpha * (similarities[~same] + margin)).sum())
    return pulled / len(set(labels)) + pushed / len(proxies)


def proxies_of(learners, dim=6, classes=CLASSES):
    return np.random.default_rng(9).normal(size=(learners, classes, dim))


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("learners", [1, 4])
def test_equal_to_loops_over_the_papers_equations(labels, learners):
    with jax.enable_x64(True):
        x, proxies = random_embeddings(learners), proxies_of(learners)
        got = losses.multi_similarity_loss(jnp.asarray(x), jnp.asarray(labels))
        want = sum(loop_multi_similarity(x[:, m], labels) for m in range(learners))
        np.testing.assert_allclose(got, want, rtol=1e-9)
        got = losses.proxy_anchor_loss(
            jnp.asarray(x), jnp.asarray(labels), jnp.asarray(proxies)
        )
        want = sum(
            loop_proxy_anchor(x[:, m], labels, proxies[m]) for m in range(learners)
        )
        np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.peers
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_equal_to_pytorch_metric_learning(labels, spread):
    import torch
    from pytorch_metric_learning import losses as peers
    from pytorch_metric_learning import miners

    rows = random_embeddings(1, spread=spread)
    embeddings = torch.tensor(rows[:, 0], requires_grad=True)
    classes = torch.tensor(labels)
    pairs = miners.MultiSimilarityMiner(epsilon=0.1)(embeddings, classes)
    peer = peers.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    want = peer(embeddings, classes, pairs)
    with jax.enable_x64(True):
        got, gradient = jax.value_and_grad(losses.multi_similarity_loss)(
            jnp.asarray(rows), jnp.asarray(labels)
        )
    np.testing.assert_allclose(got, want.item(), rtol=1e-6, atol=1e-9)
    if want.requires_grad:
        (expected,) = torch.autograd.grad(want, embeddings)
        # The peer normalises first: its gradient has no part along the embedding.
        gradient = np.asarray(gradient)
        along = np.sum(gradient[:, 0] * rows[:, 0], axis=1, keepdims=True)
        across = gradient[:, 0] - along * rows[:, 0]
        np.testing.assert_allclose(across, expected.numpy(), rtol=1e-5, atol=1e-8)

    anchor = peers.ProxyAnchorLoss(CLASSES, 6, margin=0.1, alpha=32).double()
    proxies = anchor.proxies.detach().numpy()[None]
    want = anchor(embeddings, classes)
    with jax.enable_x64(True):
        got, gradient = jax.value_and_grad(losses.proxy_anchor_loss, argnums=2)(
            jnp.asarray(rows), jnp.asarray(labels), jnp.asarray(proxies)
        )
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)
    (expected,) = torch.autograd.grad(want, anchor.proxies)
    np.testing.assert_allclose(
        np.asarray(gradient)[0], expected.numpy(), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_equal_on_any_number_of_devices(devices, name):
    with jax.enable_x64(True):
        x = jnp.asarray(random_embeddings(4, number=16))
        labels = jnp.asarray([0] * 7 + [1] * 2 + [9] * 7)
        # Ten classes do not divide by four or eight devices.
        own = {"proxies": jnp.asarray(proxies_of(4))} if "proxy" in name else {}
        config = small_config().loss
        config.update(name=name, divergence_weight=0.0)

        def gradients(x, own, labels, axis_name):
            def share(x, own):
                return losses.total(x, labels, own, config, axis_name=axis_name)[0]

            return jax.value_and_grad(share, argnums=(0, 1))(x, own)

        def program(own, batch):
            value, (by_rows, by_own) = gradients(batch["x"], own, batch["y"], "data")
            summed = jax.lax.psum((value, by_own), "data")
            return by_rows, jax.tree.map(lambda a: a[None], summed)

        mesh = parallel.make_mesh(jax.devices()[:devices])
        mapped = parallel.map_over_devices(program, mesh, rows_out=True)
        batch = parallel.split_rows({"x": x, "y": labels}, mesh)
        by_rows, (value, by_own) = mapped(parallel.replicate(own, mesh), batch)
        plain = getattr(losses, f"{name}_loss")
        want, wanted = jax.value_and_grad(
            lambda x, own: plain(x, labels, *own.values()), argnums=(0, 1)
        )(x, own)
        np.testing.assert_allclose(value[0], want, rtol=1e-12)
        np.testing.assert_allclose(np.asarray(by_rows), wanted[0], atol=1e-12)
        for got, expected in zip(
            jax.tree.leaves(by_own), jax.tree.leaves(wanted[1]), strict=True
        ):
            np.testing.assert_allclose(np.asarray(got)[0], expected, atol=1e-12)


def test_large_exponents_stay_finite():
    x = jnp.asarray(random_embeddings(2), jnp.float32)
    labels = jnp.asarray(LABELS["pairs"])
    proxies = jnp.asarray(proxies_of(2), jnp.float32)
    for value, gradient in (
        jax.value_and_grad(losses.multi_similarity_loss)(x, labels, beta=1e4),
        jax.value_and_grad(losses.proxy_anchor_loss)(x, labels, proxies, alpha=1e4),
    ):
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_labels_of_few_bits_meet_more_classes_than_they_can_count():
    x = jnp.asarray(random_embeddings(2), jnp.float32)
    proxies = jnp.asarray(proxies_of(2, classes=300), jnp.float32)
    labels = np.asarray(LABELS["pairs"])
    of_bits = [
        losses.proxy_anchor_loss(x, jnp.asarray(labels, dtype), proxies)
        for dtype in (jnp.int32, jnp.uint8, jnp.int8)
    ]
    assert of_bits[0] == of_bits[1] == of_bits[2]


@pytest.mark.parametrize("sizes", [(3, 4, 6), (4, 6)])
def test_proxies_of_other_sizes_are_refused(sizes):
    x = jnp.asarray(random_embeddings(2), jnp.float32)
    message = re.escape(f"[8, 2, 6]; these are {list(sizes)}")
    with pytest.raises(ValueError, match=message):
        losses.proxy_anchor_loss(x, jnp.zeros(8, jnp.int32), jnp.ones(sizes))


@pytest.mark.slow
def test_proxies_are_trained_saved_and_restored(tmp_path, monkeypatch):
    """Training in two halves ends in the same proxies; a model is used without them."""
    replace_models(monkeypatch)
    stored = {}
    for name, stops in {"whole": (4,), "halves": (2, 4)}.items():
        for steps in stops:
            config = small_config()
            config.loss.name = "proxy_anchor"
            config.train.update(steps=steps, schedule="constant", loss_factor=100.0)
            train.train_and_evaluate(config, str(tmp_path / name))
        saved = checkpoints.Checkpoints(tmp_path / name, read_only=True)
        stored[name] = saved.restore_as_stored()
        saved.close()
    learners, classes, _ = stored["whole"]["loss_params"]["proxies"].shape
    assert learners == config.model.num_learners and classes > 1
    jax.tree.map(np.testing.assert_array_equal, stored["whole"], stored["halves"])
    model = abe_jax.load(tmp_path / "whole")
    assert model.embed(np.zeros((64, 64, 3), np.uint8)).shape[1] == learners
    config.loss.name = "contrastive"
    with pytest.raises(UserError, match="loss.name"):
        train.train_and_evaluate(config, str(tmp_path / "whole"))
