"""Experiment trackers, with stand-ins for their packages."""

import sys
import types

import pytest

from abe_jax.errors import UserError
from abe_jax.workdir import metrics, trackers
from configs import default

CONFIG = default.get_config()


class WandB(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()
        self.begun, self.lines, self.finished = [], [], 0
        self.axes, self.last = {}, -1

    def init(self, **options):
        self.begun.append(options)
        return self

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, line, step=None):
        """As there: a line of a step before the last is dropped."""
        if step is not None and step < self.last:
            return
        self.last = self.last if step is None else step
        line = dict(line)
        self.lines.append((line.pop("step", step), line))

    def finish(self):
        self.finished += 1


class MLflow(types.ModuleType):
    def __init__(self):
        super().__init__("mlflow")
        self.__spec__ = types.SimpleNamespace()
        self.begun, self.lines, self.params, self.ended = [], [], [], 0

    def start_run(self, run_id, run_name):
        self.begun.append((run_id, run_name))
        info = types.SimpleNamespace(run_id=run_id or "made there")
        return types.SimpleNamespace(info=info)

    def log_params(self, params):
        self.params.append(params)

    def log_metrics(self, line, step):
        self.lines.append((step, line))

    def end_run(self):
        self.ended += 1


@pytest.fixture
def packages(monkeypatch):
    found = WandB(), MLflow()
    for module in found:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def written(workdir):
    writer = metrics.MetricWriter(workdir, resume_step=0)
    tracked = trackers.attach(writer, ("wandb", "mlflow"), workdir, CONFIG)
    tracked.write(1, {"eval/recall@1": 0.5})
    tracked.sync()
    tracked.close()


def test_lines_go_to_all_and_a_second_start_goes_on_with_the_run(packages, tmp_path):
    wandb, mlflow = packages
    written(tmp_path)
    written(tmp_path)
    assert wandb.lines == [(1, {"eval/recall@1": 0.5})] * 2
    assert mlflow.lines == [(1, {"eval/recall_at_1": 0.5})] * 2
    assert (wandb.finished, mlflow.ended) == (2, 2)
    first, second = wandb.begun
    assert first == second
    assert (first["resume"], first["name"]) == ("allow", tmp_path.name)
    assert first["config"]["train"]["batch_size"] == 64
    assert mlflow.begun == [(None, tmp_path.name), ("made there", tmp_path.name)]
    assert [params["train.batch_size"] for params in mlflow.params] == [64]
    assert len(metrics.read(tmp_path)) == 1


def test_what_a_resume_writes_again_is_not_lost(packages, tmp_path):
    writer = metrics.MetricWriter(tmp_path, resume_step=0)
    tracked = trackers.attach(writer, ("wandb",), tmp_path, CONFIG)
    for step in (9, 5):
        tracked.write(step, {"train/loss": 1.0})
    tracked.close()
    assert [step for step, _ in packages[0].lines] == [9, 5]
    assert packages[0].axes == {"step": None, "*": "step"}


def test_a_tracker_that_fails_costs_a_warning(packages, tmp_path, caplog):
    def log(line):
        raise ConnectionError("no route to the service")

    packages[0].log = log
    written(tmp_path)
    assert "the experiment tracker failed: no route to the service" in caplog.text
    assert len(packages[1].lines) == len(metrics.read(tmp_path)) == 1


def test_one_that_does_not_start_is_told(packages, tmp_path):
    def init(**options):
        raise RuntimeError("not logged in")

    packages[0].init = init
    with pytest.raises(UserError, match="wandb does not start: not logged in"):
        written(tmp_path)


@pytest.mark.parametrize("when", ["read", "written"])
def test_nothing_stays_open_where_their_runs_cannot_be_kept(
    when, packages, tmp_path, monkeypatch
):
    closed = []
    writer = metrics.NoWriter()
    monkeypatch.setattr(writer, "close", lambda: closed.append(True))
    if when == "read":
        (tmp_path / "trackers.json").write_text("[]")
    else:
        (tmp_path / "trackers.json").mkdir()
        monkeypatch.setattr(trackers.pathlib.Path, "exists", lambda path: False)
    with pytest.raises(UserError):
        trackers.attach(writer, ("wandb",), tmp_path, CONFIG)
    assert closed == [True]
    assert packages[0].finished == len(packages[0].begun) == (when == "written")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", "train.trackers is 'wandbb'; known are 'wandb', 'mlflow'"),
        ("mlflow", "'mlflow', which is not installed: pip install mlflow"),
    ],
)
def test_what_is_not_there(name, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        trackers.require_installed((name,))


def test_without_trackers_the_writer_stays_as_it_is(tmp_path):
    writer = metrics.NoWriter()
    assert trackers.attach(writer, (), tmp_path, CONFIG) is writer
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_broken_is_told(packages, tmp_path, monkeypatch):
    def broken(name):
        raise ImportError("cannot import name 'errors'")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(UserError, match="wandb does not start: cannot import name"):
        written(tmp_path)
