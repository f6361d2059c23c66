"""What must be refused is refused where users enter, before anything is written."""

import os
import shutil

import numpy as np
import pytest
from faults.training_test import folder_of

from abe_jax import evaluate, processes, report, train
from abe_jax.errors import UserError
from abe_jax.train import forecast
from abe_jax.workdir import claim

ENTRIES = {
    "train": train.train_and_evaluate,
    "evaluate": report.evaluate_and_report,
    "dry_run": forecast.show_forecast,
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 2**64),
        ("train.batch_size", -8),
        ("train.log_every", 0),
        ("train.steps", -1),
        ("train.clip_norm", -1.0),
        ("augment.flip", 2.0),
    ],
)
def test_a_value_out_of_range(tiny, tmp_path, entry, field, value):
    config = tiny()
    with config.ignore_type():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=rf"{field} (is|=) "):
        ENTRIES[entry](config, str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entry", ["train", "evaluate"])
def test_a_remote_workdir(tiny, tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs://bucket/run is a remote path"):
        ENTRIES[entry](tiny(), "gs://bucket/run")
    assert list(tmp_path.iterdir()) == []


def test_evaluation_by_processes_of_other_configs(tiny, tmp_path, monkeypatch):
    config = tiny()
    claim.claim(tmp_path, config, {}, steered={}, step=0)
    monkeypatch.setattr(processes, "gather", lambda own: np.stack([own, own[::-1]]))
    with pytest.raises(UserError, match="0 and 1 were started with different configs"):
        evaluate.measure_checkpoint(config, str(tmp_path))


def test_a_workdir_in_the_home_folder(tiny, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    train.train_and_evaluate(tiny(steps=2), "~/run")
    report.evaluate_and_report(tiny(steps=2), "~/run")
    assert os.listdir() == ["home"] and os.listdir("home") == ["run"]


def test_never_seen_is_said_of_classes_that_were_not_trained(
    tiny, photos, tmp_path, caplog
):
    """A finished model that is measured on another folder."""
    config = folder_of(tiny(), photos)
    train.train_and_evaluate(config, str(tmp_path / "run"))
    for name, number, known in (("known", 0, 8), ("new", 100, 0)):
        # Of 16 classes the second half is evaluated; 0 to 15 of `photos` were trained.
        for i in range(16):
            source = photos / f"class{i:02}"
            shutil.copytree(source, tmp_path / name / f"class{number + i:02}")
        config.data.path = str(tmp_path / name)
        caplog.clear()
        found = evaluate.measure_checkpoint(config, str(tmp_path / "run")).content
        assert found["protocol"]["zero_shot"] is not bool(known)
        assert found["protocol"]["other_data"] == config.data.path
        assert f"{known} of its classes have the names of training" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("augment.crop", "center", "augment.crop is 'center'; known are 'area', 'plai"),
        ("model.pretrained", "typo", "'typo' does not exist; give a file of weights, "),
    ],
)
def test_the_workdir_of_a_mistake_is_not_claimed(tiny, tmp_path, field, value, message):
    config = tiny()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()  # it may be corrected


def test_a_model_of_drawn_birds_is_measured_on_a_folder(tiny, photos, tmp_path):
    config = tiny()
    train.train_and_evaluate(config, str(tmp_path / "run"))
    config.data.update(name="image_folder", path=str(photos))
    protocol = evaluate.measure_checkpoint(config, str(tmp_path / "run")).content[
        "protocol"
    ]
    assert protocol["data"] == "image_folder" and protocol["zero_shot"]
    assert protocol["other_data"] == str(photos)
