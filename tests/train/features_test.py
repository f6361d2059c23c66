"""A frozen S: it stays as it is, and its outputs come from the disk."""

import itertools
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from flax import nnx
from short import shorten
from tiny import replace_models
from train_test import small_config

import abe_jax
from abe_jax import (
    data,
    evaluate,
    models,
    optimizer,
    processes,
    train,
    train_step,
)
from abe_jax.errors import UserError
from abe_jax.models.trunks import TRUNKS
from abe_jax.train import features
from abe_jax.train_step import PARTS
from abe_jax.workdir import NotWritable, checkpoints

SMALLEST = "vit_small_patch14_dinov2"  # to compile


def frozen_config(cache=None, trunk=SMALLEST, name="abe", **fields):
    config = small_config()
    config.model.update(trunk=trunk, name=name, train="heads")
    if "vit" in trunk:
        size = 2 * TRUNKS[trunk].preprocessing.multiple_of
        config.data.update(load_size=size, image_size=size)
    config.augment.update(crop="centre", flip=0.0, brightness=0.0, contrast=0.0)
    config.data.feature_cache = None if cache is None else str(cache)
    config.train.update(steps=2, eval_every=2, checkpoint_every=2, schedule="constant")
    config.train.update(log_every=1, **fields)
    return config


def stored(workdir):
    saved = checkpoints.Checkpoints(workdir, read_only=True)
    try:
        return saved.restore_as_stored()
    finally:
        saved.close()


def losses_of(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize(
    "trunk",
    [
        pytest.param(SMALLEST, marks=pytest.mark.slow),
        pytest.param("googlenet_bn", marks=pytest.mark.campaign),
    ],
)
def test_s_stays_and_kept_outputs_train_the_same(trunk, tmp_path):
    branch = "block12" if "vit" in trunk else None
    states = {}
    for name, cache in {"kept": tmp_path / "cache", "anew": None}.items():
        config = frozen_config(cache, trunk)
        config.model.branch = branch
        train.train_and_evaluate(config, str(tmp_path / name))
        states[name] = stored(tmp_path / name)
    kept, anew = (losses_of(tmp_path / name) for name in states)
    assert kept[0] == pytest.approx(anew[0], rel=1e-5)
    assert kept[1] == pytest.approx(anew[1], rel=1e-3)  # a step enlarges rounding
    config.train.steps = 1
    train.train_and_evaluate(config, str(tmp_path / "before"))
    before = stored(tmp_path / "before")
    for state in states.values():
        for part in ("params", "model_state"):
            jax.tree.map(
                np.testing.assert_array_equal,
                state[part].get("spatial", {}),
                before[part].get("spatial", {}),
            )
        kernel = state["params"]["head"]["kernel"]
        assert np.abs(kernel - before["params"]["head"]["kernel"]).max() > 0
    trained = sum(
        value.size
        for name, part in before["params"].items()
        if name != "spatial"
        for value in jax.tree.leaves(part)
    )
    moments = max(value.size for value in jax.tree.leaves(before["opt_state"]))
    assert moments == trained


@pytest.mark.slow
def test_outputs_are_computed_once_and_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    replace_models(monkeypatch)
    cache = tmp_path / "cache"
    train.train_and_evaluate(frozen_config(cache, steps=4), str(tmp_path / "whole"))
    (folder,) = cache.iterdir()
    made = []
    monkeypatch.setattr(train_step, "make_features_step", lambda *_: made.append(1))
    for steps in (2, 4):
        config = frozen_config(cache, steps=steps)
        train.train_and_evaluate(config, str(tmp_path / "halves"))
    assert not made and list(cache.iterdir()) == [folder]
    jax.tree.map(
        np.testing.assert_array_equal,
        stored(tmp_path / "whole"),
        stored(tmp_path / "halves"),
    )


def test_what_lies_behind_s_is_not_in_the_key(tmp_path, monkeypatch):
    def key(**fields):
        config = frozen_config(tmp_path)
        config.model.update(fields)
        return features._key(splits.train, config, model, state)

    config = frozen_config(tmp_path)
    splits = data.create(config.data)
    model = models.create(config.model, rngs=nnx.Rngs(0))
    state = train_step.initial_state(model, optimizer.create(config.train)[0])
    behind = {"attention_blocks": 1, "num_learners": 4, "name": "m_heads"}
    assert key() == key(**behind) != key(width=0.1)


@pytest.mark.slow
def test_another_file_or_another_s_has_features_of_its_own(
    photos, tmp_path, monkeypatch
):
    replace_models(monkeypatch)
    mine, cache = tmp_path / "photos", tmp_path / "cache"
    shutil.copytree(photos, mine)

    def kept(number, seed=0):
        config = frozen_config(cache, steps=1)
        config.data.update(name="image_folder", path=str(mine), sampler="pairs")
        config.seed = seed
        train.train_and_evaluate(config, str(tmp_path / f"run {number}"))
        return {path.name for path in cache.iterdir()}

    first = kept(0)
    assert kept(1) == first
    image = next(path for path in sorted(mine.rglob("*")) if path.is_file())
    os.utime(image, ns=(1, 1))
    second = kept(2)
    assert len(second - first) == 1
    assert len(kept(3, seed=1) - second) == 1


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("model", {"train": "head"}, "'head'; known are 'all', 'heads'"),
        ("model", {"train": "all"}, "frozen S: set --config.model.train=heads"),
        ("augment", {"flip": 0.5}, "the same view .* --config.augment.crop=centre"),
        ("augment", {"crop": "area"}, "the same view"),
    ],
)
def test_what_cannot_be_kept_is_refused(section, fields, message, tmp_path):
    config = frozen_config(tmp_path / "cache")
    config[section].update(fields)
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_an_interrupt_while_outputs_are_computed(tmp_path, monkeypatch):
    """Nothing is left of them, and the run goes on to its end, where none is needed."""
    replace_models(monkeypatch)
    cache, run = tmp_path / "cache", tmp_path / "run"
    gather = processes.gather_rows

    def interrupted(rows):
        signal.raise_signal(signal.SIGTERM)
        return gather(rows)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "gather_rows", interrupted)
        with pytest.raises(train.Interrupted, match="step 0 is saved"):
            train.train_and_evaluate(frozen_config(cache), str(run))
    assert list(cache.iterdir()) == []
    train.train_and_evaluate(frozen_config(cache), str(run))
    assert len(losses_of(run)) == 2
    shutil.rmtree(cache)
    train.train_and_evaluate(frozen_config(cache), str(run))
    assert not cache.exists()


@pytest.mark.slow
def test_a_damaged_cache_is_named(tmp_path, monkeypatch):
    replace_models(monkeypatch)
    cache = tmp_path / "cache"
    train.train_and_evaluate(frozen_config(cache), str(tmp_path / "run"))
    (folder,) = cache.iterdir()
    records = folder / "features.array_record"
    records.write_bytes(records.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"features in {folder}.*delete that folder"):
        train.train_and_evaluate(frozen_config(cache), str(tmp_path / "other"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    replace_models(monkeypatch)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot write data.feature_cache"):
        train.train_and_evaluate(
            frozen_config(tmp_path / "cache"), str(tmp_path / "run")
        )


def test_what_killed_runs_left_is_cleared_away_after_a_day(tmp_path):
    for name, hours in ((".unfinished-old", 25), (".unfinished-new", 1)):
        (tmp_path / name).mkdir()
        records = tmp_path / name / "features.array_record"
        records.write_bytes(b"half")
        then = time.time() - 3600 * hours
        for path in (records, tmp_path / name):
            os.utime(path, (then, then))
    with features._Writer(tmp_path / "key") as writer:
        writer.write(np.zeros((2, 3), np.float32))
    assert {path.name for path in tmp_path.iterdir()} == {"key", ".unfinished-new"}
    with features._Writer(tmp_path / "key") as another:  # who was second
        another.write(np.zeros((2, 3), np.float32))
    assert {path.name for path in tmp_path.iterdir()} == {"key", ".unfinished-new"}


def test_a_cache_that_cannot_be_moved_to_its_place_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rename", refuse)
    with (
        pytest.raises(
            NotWritable, match="data.feature_cache .*Operation not permitted"
        ),
        features._Writer(tmp_path / "key") as writer,
    ):
        writer.write(np.zeros((2, 3), np.float32))
    assert not list(tmp_path.iterdir())


_TRUNKS = ("googlenet", "googlenet_bn", "resnet50", "vit_small_patch14_reg4_dinov2")


# By -m slow each trunk, model and part once or twice; the others by -m campaign.
_EACH = list(itertools.product(_TRUNKS, ("abe", "m_heads", "one_head"), PARTS))
_SLOW = {
    ("googlenet", "one_head", "heads"),
    ("googlenet_bn", "one_head", "all"),
    ("resnet50", "m_heads", "heads"),
    ("vit_small_patch14_reg4_dinov2", "abe", "all"),
}


@pytest.mark.parametrize(
    ("trunk", "name", "part"),
    [
        pytest.param(
            *each, marks=pytest.mark.slow if each in _SLOW else pytest.mark.campaign
        )
        for each in _EACH
    ],
)
def test_every_trunk_and_model_trains_resumes_and_is_used(
    trunk, name, part, tmp_path, monkeypatch
):
    if (trunk, name, part) in _SLOW:  # the campaign has the whole ones
        shorten(monkeypatch)
    heads = part == "heads"
    for steps in (1, 2):
        config = frozen_config(tmp_path / "cache" if heads else None, trunk, name)
        config.model.train = part
        config.train.steps = steps
        metrics = train.train_and_evaluate(config, str(tmp_path / "run"))
    evaluation = evaluate.measure_checkpoint(config, str(tmp_path / "run"))
    assert evaluation.content["step"] == 2
    assert evaluation.content["recall"]["1"] == metrics["eval/recall@1"]
    model = abe_jax.load(tmp_path / "run")
    size = config.data.load_size
    rows = model.embed(np.zeros((2, size, size, 3), np.uint8))
    assert rows.shape == (2, 1 if name == "one_head" else 2, rows.shape[2])
    from abe_jax.apply import export

    export.export_model(
        config, str(tmp_path / "run"), output=str(tmp_path / "m.onnx"), step=None
    )
    assert (tmp_path / "m.onnx").stat().st_size > 1000
