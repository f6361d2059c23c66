"""A workdir belongs to one config and one set of data; what may change, does."""

import json
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from abe_jax import data, train
from abe_jax.data import prepared
from abe_jax.errors import UserError
from abe_jax.workdir import NotWritable, claim, fields, locate, lock
from configs import quickstart

DESCRIPTION = {
    "fingerprint": "a",
    "storage": "files",
    "classes": {"train": {"ash": 3, "elm": 4}, "test": {"oak": 5}},
}


@pytest.fixture
def claimed(tmp_path):
    """A workdir of the quickstart."""
    claim.claim(tmp_path, quickstart.get_config(), DESCRIPTION, steered={}, step=0)
    return tmp_path


def test_an_empty_folder_is_anyones(tmp_path):
    assert claim.require_own(tmp_path, quickstart.get_config(), DESCRIPTION) == {}


def test_another_config_is_refused_with_the_difference(claimed):
    config = quickstart.get_config()
    config.loss.margin = 0.5
    config.seed = 3
    for check in (
        lambda: claim.require_own(claimed, config, DESCRIPTION),
        lambda: claim.require_run(claimed, config),
    ):
        with pytest.raises(
            UserError, match=r"loss.margin \(there 1.0, now 0.5\), seed \(there 0, now"
        ):
            check()


def other(value, name=""):
    """Another value of the same type."""
    if name.endswith("attention_blocks"):
        return 3
    if isinstance(value, bool):
        return not value
    if isinstance(value, str) or value is None:
        return {"shard_map": "pmap", "cosine": "constant"}.get(value, "elsewhere")
    if isinstance(value, tuple):
        return ("wandb",) if name.endswith("trackers") else (1, 3)
    return value + 1 if isinstance(value, int) else value * 2 + 0.1


@pytest.mark.parametrize("name", fields.FREE_FIELDS)
def test_free_fields_may_change(claimed, name):
    config = quickstart.get_config()
    section, field = name.split(".")
    if field not in config[section]:
        pytest.fail(f"{name} is not a field any more")
    config[section][field] = other(config[section][field], name)
    assert claim.require_own(claimed, config, DESCRIPTION) == {}
    claim.require_run(claimed, config)


def test_a_run_of_drawn_birds_may_meet_a_folder(claimed):
    config = quickstart.get_config()
    config.data.update(name="image_folder", path="photos")
    claim.require_run(claimed, config, may_differ=("data.name",))
    with pytest.raises(UserError, match=r"data.name \(there 'birds', now 'image_fold"):
        claim.require_run(claimed, config)


def test_a_file_of_weights_may_be_moved_once_it_was_read(tmp_path):
    config = quickstart.get_config()
    config.model.pretrained = "here/googlenet.onnx"
    claim.claim(tmp_path, config, DESCRIPTION, steered={}, step=0)
    config.model.pretrained = "elsewhere/googlenet.onnx"
    assert claim.require_own(tmp_path, config, DESCRIPTION) == {}
    claim.require_run(tmp_path, config)
    # What the run began with stays on record.
    own = claim.with_own_weights(tmp_path, config)
    assert own.model.pretrained == "here/googlenet.onnx"
    assert config.model.pretrained == "elsewhere/googlenet.onnx"
    assert claim.with_own_weights(tmp_path / "new", config) is config


@pytest.mark.parametrize("name", fields.STEERING_FIELDS)
def test_steering_fields_may_change_and_it_is_recorded(claimed, name):
    config = quickstart.get_config()
    section, field = name.split(".")
    before = config[section][field]
    after = config[section][field] = other(before)
    steered = claim.require_own(claimed, config, DESCRIPTION)
    assert steered == {name: (before, after)}
    for _ in range(2):  # a kill may come before the config is written
        claim.claim(claimed, config, DESCRIPTION, steered=steered, step=7)
    (line,) = (claimed / "changes.jsonl").read_text().splitlines()
    want = {"step": 7, "field": name, "before": before, "after": after}
    assert json.loads(line) == want
    with (claimed / "changes.jsonl").open("ab") as file:
        file.write(b"x\xff\n")  # of a damaged one nothing is lost
    claim.claim(claimed, config, DESCRIPTION, steered=steered, step=8)
    first, damaged, _ = (claimed / "changes.jsonl").read_bytes().splitlines()
    assert (first.decode(), damaged) == (line, b"x\xff")
    assert claim.require_own(claimed, config, DESCRIPTION) == {}


def test_every_other_field_is_fixed(claimed):
    config = quickstart.get_config()
    may_change = {*fields.FREE_FIELDS, *fields.STEERING_FIELDS}
    fixed = [name for name in fields.flat(config) if name not in may_change]
    assert len(fixed) > 30
    for name in fixed:
        config = quickstart.get_config()
        *sections, field = name.split(".")
        section = config
        for name_of_section in sections:
            section = section[name_of_section]
        section[field] = other(section[field], name)
        with pytest.raises(UserError, match=f"another config: {name} "):
            claim.require_own(claimed, config, DESCRIPTION)


def test_other_data_is_refused_with_the_difference(claimed):
    config = quickstart.get_config()
    classes = {"train": {"alder": 9, "ash": 3}, "test": {"elm": 4, "oak": 5}}
    now = {"fingerprint": "b", "storage": "files", "classes": classes}
    assert data.differences(DESCRIPTION, now)
    with pytest.raises(
        UserError, match="is not what the run in .* began with"
    ) as error:
        claim.require_own(claimed, config, now)
    for word in ("alder", "elm", "Bring the data back"):
        assert word in str(error.value)
    with pytest.raises(UserError, match="began with"):
        claim.require_same_data(claimed, now)
    claim.require_same_data(claimed, DESCRIPTION)


def test_a_run_of_an_earlier_version_learns_its_data(claimed):
    (claimed / "data.json").unlink()
    config = quickstart.get_config()
    claim.claim(claimed, config, DESCRIPTION, steered={}, step=0)
    assert json.loads((claimed / "data.json").read_text()) == DESCRIPTION


@pytest.mark.parametrize("name", ["config.json", "data.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_file_is_named(claimed, name, text):
    (claimed / name).write_text(text)
    with pytest.raises(UserError, match=name):
        claim.require_own(claimed, quickstart.get_config(), DESCRIPTION)
    if name == "config.json":
        with pytest.raises(UserError, match=name):
            claim.with_own_weights(claimed, quickstart.get_config())


def test_a_workdir_among_the_images_is_refused(tmp_path, monkeypatch):
    def of(path, name="image_folder"):
        return ConfigDict({"path": path, "name": name})

    images = tmp_path / "images"
    (images / "ash").mkdir(parents=True)
    for inside in (images, images / "runs" / "one"):
        with pytest.raises(UserError, match="would be read as a class; give a folder"):
            claim.require_outside_data(inside, of(str(images)))
    claim.require_outside_data(tmp_path / "runs", of(str(images)))
    claim.require_outside_data(tmp_path / "images.run", of(str(images)))
    claim.require_outside_data(tmp_path / "runs", of(None))
    section = of(str(images))
    section.feature_cache = str(images / "cache")
    with pytest.raises(UserError, match="feature_cache = .*would be read as a class"):
        claim.require_outside_data(tmp_path / "runs", section)
    section.feature_cache = "gs://bucket/cache"
    with pytest.raises(UserError, match="data.feature_cache=gs:.* is a remote path"):
        claim.require_outside_data(tmp_path / "runs", section)
    claim.require_outside_data(images, of("~no-such-user/x"))
    (images / "cub200" / prepared.VERSION).mkdir(parents=True)
    (images / "cub200" / prepared.VERSION / prepared.INDEX_FILE).touch()
    claim.require_outside_data(images / "run", of(str(images), "cub200"))
    monkeypatch.setenv("HOME", str(tmp_path))
    claim.require_outside_data(images / "run", of("~/images", "cub200"))
    with pytest.raises(UserError, match="would be read as a class"):
        claim.require_outside_data(images / "run", of("~/images"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"loss": 1}\n'),
        ("report.html", "<p>mine</p>"),
        ("evaluation.json", "{}"),
        ("data.json", "{}"),
        ("changes.jsonl", ""),
        ("lock", "poetry"),
    ],
)
def test_a_users_files_are_not_written_over(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"holds {name}, which abe_jax did not write"):
        train.train_and_evaluate(quickstart.get_config(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


def test_a_users_config_is_no_runs(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "my-app", "port": 80}')
    with pytest.raises(UserError, match="config.json was not written by abe_jax"):
        claim.require_own(tmp_path, quickstart.get_config(), DESCRIPTION)


def test_what_a_killed_start_left_is_a_runs(tmp_path, claimed):
    claim.refuse_foreign_files(tmp_path / "new")
    (tmp_path / "new").mkdir()
    with lock.hold(tmp_path / "new"):
        pass
    claim.refuse_foreign_files(tmp_path / "new")
    (claimed / "metrics.jsonl").write_text("")
    claim.refuse_foreign_files(claimed)


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://b/r", "hdfs://b/r", " ", ""])
def test_remote_and_empty_workdirs_are_refused(path):
    with pytest.raises(UserError, match="local folder|is empty"):
        locate(path)


def test_home_is_understood(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/run") == tmp_path / "run"


def test_a_workdir_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    advice = "cannot write to --workdir: .*; give a --workdir that can be written to"
    with pytest.raises(NotWritable, match=advice):
        with lock.hold(tmp_path / "file" / "run"):
            pass
    with pytest.raises(UserError, match="file is a file; give a folder"):
        train.train_and_evaluate(quickstart.get_config(), str(tmp_path / "file"))


def test_a_finished_model_meets_other_data(claimed):
    """With another path that is said, at its own path it is refused."""
    config = quickstart.get_config()
    now = {**DESCRIPTION, "fingerprint": "b", "classes": {"test": {"ash": 3}}}
    with pytest.raises(UserError, match="not what the run in"):
        claim.other_data(claimed, config, now)
    config.data.path = "elsewhere"
    assert claim.other_data(claimed, config, DESCRIPTION) is None  # it only moved
    found = claim.other_data(claimed, config, now)
    assert found is not None
    assert (found.path, found.trained) == ("elsewhere", ["ash", "elm"])
    assert "train: 2 class(es) no longer" in found.difference


def test_processes_write_a_file_at_the_same_time(tmp_path):
    """Such as --mode=evaluate in the workdir of a run that trains."""
    code = (
        "import pathlib, sys; from abe_jax.workdir import write_whole\n"
        "for i in range(100): write_whole(pathlib.Path(sys.argv[1]), sys.argv[2] * 999)"
    )
    path = tmp_path / "report.html"
    command = [sys.executable, "-c", code, str(path)]
    writers = [subprocess.Popen([*command, text]) for text in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert path.read_text() in ("a" * 999, "b" * 999)
    assert list(tmp_path.iterdir()) == [path]
