"""Which file --config means, and the config that a workdir holds."""

import json
import logging
import subprocess
import sys

import pytest
from command_line import ROOT

from abe_jax import command_line
from abe_jax.errors import UserError
from abe_jax.workdir import config_files
from configs import quickstart


def test_a_bare_name_is_the_folders_own_config_or_the_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find("quickstart") == str(ROOT / "configs" / "quickstart.py")
    assert config_files.find("sop:8") == f"{ROOT / 'configs' / 'sop.py'}:8"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").touch()
    assert config_files.find("quickstart") == "configs/quickstart.py"
    assert config_files.find("configs/quickstart.py:a") == "configs/quickstart.py:a"
    monkeypatch.setenv("HOME", str(tmp_path))  # `--config=~/x.py` no shell expands
    (tmp_path / "mine.py").touch()
    assert config_files.find("~/mine.py:a") == f"{tmp_path}/mine.py:a"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quickstrat", "did you mean --config=quickstart"),
        ("configs/quickstart.py", "did you mean --config=quickstart"),
        ("nothing.py", "give the path of a file"),
        ("", "give the path of a file"),
        (".", "give the path of a file"),
    ],
)
def test_a_file_that_is_not_there(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no file .*{hint}.*cub200, "):
        config_files.find(name)


def test_own_configs_start_from_the_packages(tmp_path):
    """In a folder with configs of one's own, without an installed clone beside it."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text(
        "from configs import default\n\n\ndef get_config():\n"
        "    config = default.get_config()\n    config.seed = 5\n    return config\n"
    )
    program = (
        "from abe_jax.workdir import config_files; config_files.make_importable();"
        "from configs import mine, quickstart;"
        "print(mine.get_config().seed, quickstart.get_config().train.steps)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    steps = quickstart.get_config().train.steps
    assert done.stdout == f"5 {steps}\n", done.stderr


def left_by(config, workdir):
    text = config.to_json_best_effort()
    (workdir / config_files.CONFIG_FILE).write_text(text)


def test_the_config_of_a_workdir_is_that_of_its_run(tmp_path):
    config = quickstart.get_config()
    left_by(config, tmp_path)
    found = config_files.of_workdir(tmp_path)
    assert found == config
    assert found.get_type("seed") is int and found.data.get_type("path") is str


def test_a_workdir_in_the_home_folder_and_a_remote_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    config = quickstart.get_config()
    left_by(config, tmp_path / "run")
    assert config_files.of_workdir("~/run") == config
    with pytest.raises(UserError, match="gs://bucket/run is a remote path"):
        config_files.of_workdir("gs://bucket/run")


def test_fields_that_came_later_have_their_defaults(tmp_path):
    config = quickstart.get_config()
    del config.train["chunks"]
    config.train.gone = 3
    left_by(config, tmp_path)
    found = config_files.of_workdir(tmp_path)
    assert found.train.chunks == 1
    assert "gone" not in found.train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no run"),
        ("{", "cannot read .*config.json"),
        (json.dumps({"name": "app"}), "was not written by abe_jax"),
        (
            json.dumps({"model": {}, "data": {}, "train": {"steps": "many"}}),
            "is of another version: .*steps",
        ),
    ],
)
def test_a_workdir_without_a_config(text, message, tmp_path):
    if text is not None:
        (tmp_path / config_files.CONFIG_FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        config_files.of_workdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "value", "rest"),
    [
        (["--config.a=1", "--config=x"], "x", ["--config.a=1"]),
        (["-config", "x", "--config.a", "1"], "x", ["--config.a", "1"]),
        (["--config=x", "--config=y:z=1"], "y:z=1", []),
        (
            ["--configs=x", "--", "--config=y"],
            None,
            ["--configs=x", "--", "--config=y"],
        ),
        (["--config"], None, []),
    ],
)
def test_a_flag_is_taken_from_anywhere(arguments, value, rest):
    assert command_line.take(arguments, "config") == (value, rest)


def test_what_orbax_logs_of_an_error_is_a_line_only(caplog):
    """It is raised as well, and told as the program tells errors."""
    log = logging.getLogger("absl")
    log.addFilter(command_line.without_traceback)
    try:
        try:
            raise RuntimeError("lost")
        except RuntimeError:
            log.exception("Save Finalize thread failed.")
    finally:
        log.removeFilter(command_line.without_traceback)
    assert "Save Finalize thread failed." in caplog.text
    assert "Traceback" not in caplog.text
