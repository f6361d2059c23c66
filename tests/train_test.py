"""The loop: what it compiles, and what it never does."""

import collections

import jax
import pytest
from tiny import replace_models

from abe_jax import evaluate, train, train_step
from abe_jax.train import progress
from abe_jax.workdir import checkpoints
from configs import quickstart


def small_config():
    config = quickstart.get_config()
    config.model.update(width=0.05, num_learners=2, embedding_dim=8)
    config.data.update(load_size=32, image_size=32, images_per_class=4)
    config.data.update(birds_classes=16, birds_images_per_class=8)
    config.train.update(batch_size=16, steps=50, eval_every=25, checkpoint_every=50)
    config.eval.batch_size = 4
    return config


@pytest.fixture
def traces(monkeypatch):
    """How often JAX has traced each function that `train_step` makes."""
    counts = collections.Counter()

    def counted(name):
        make = getattr(train_step, name)

        def make_counted(*arguments, **options):
            program = make(*arguments, **options)

            def traced(*operands):
                counts[name] += isinstance(
                    jax.tree.leaves(operands)[0], jax.core.Tracer
                )
                return program(*operands)

            return traced

        monkeypatch.setattr(train_step, name, make_counted)

    counted("make_train_step")
    counted("make_embed_step")
    return counts


@pytest.fixture
def guarded_steps(monkeypatch):
    """The steps between two evaluations, with implicit transfers forbidden."""
    steps = []

    def without_guard(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            jax.config.update("jax_transfer_guard", "allow")
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    add = progress.Reporter.add

    def add_and_guard(self, step, metrics):
        add(self, step, metrics)
        steps.append(jax.config.jax_transfer_guard)
        jax.config.update("jax_transfer_guard", "disallow")

    monkeypatch.setattr(progress.Reporter, "add", add_and_guard)
    without_guard(evaluate.Evaluator, "run")
    without_guard(checkpoints.Checkpoints, "save")
    yield steps
    jax.config.update("jax_transfer_guard", "allow")


@pytest.mark.slow
def test_every_function_is_traced_once(tmp_path, traces, guarded_steps, monkeypatch):
    """In 50 steps and three evaluations, the untrained model's included."""
    replace_models(monkeypatch)
    config = small_config()
    metrics = train.train_and_evaluate(config, str(tmp_path))
    assert metrics["eval/recall@1"] >= 0
    assert traces == {"make_train_step": 1, "make_embed_step": 1}
    assert guarded_steps.count("disallow") == 48
