"""Whole runs that are disturbed: each goes on to the same end, or says why not."""

import contextlib
import json
import resource
import shutil
import signal

import jax
import numpy as np
import pytest
from command_line import lines_of, without_times
from PIL import Image

from abe_jax import evaluate, report, train, train_step
from abe_jax.errors import UserError
from abe_jax.train import loop, progress
from abe_jax.workdir import NotWritable, checkpoints, claim, lock, metrics, seals


def _slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def final(workdir, step=8):
    """The state after a step, and the metrics but for times."""
    with contextlib.closing(checkpoints.Checkpoints(workdir, read_only=True)) as saved:
        state = saved.restore_as_stored(step)
    return jax.tree.map(np.asarray, state), without_times(lines_of(workdir))


def assert_same(found, want):
    assert found[1] == want[1]
    for one, other in zip(
        jax.tree.leaves(found[0]), jax.tree.leaves(want[0]), strict=True
    ):
        np.testing.assert_array_equal(one, other)


class Killed(BaseException):
    """Stands in for the death of the process: nothing catches it."""


# With how many of the first calls are tried: a run makes no more, or three will do.
POINTS = {
    "save": (checkpoints.Checkpoints, "save", 2),
    "evaluation.json": (evaluate, "write", 3),
    "claim": (claim, "claim", 1),
    "old evaluation": (loop, "_drop_later_evaluation", 1),
    "step": (progress.Reporter, "add", 3),
    "metrics": (metrics.MetricWriter, "write", 3),
    "sync": (metrics.MetricWriter, "sync", 2),
    "seal": (seals, "seal", 2),
    "evaluation": (evaluate.Evaluator, "run", 3),
    "page": (report, "write", 3),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "name",
    [name if i < 1 else _slow(name) for i, name in enumerate(POINTS)],
)
def test_a_death_at_any_point_is_made_good(
    name, after, tiny, finished, tmp_path, monkeypatch
):
    """At each of the first calls of a function that the workdir depends on."""
    owner, function, calls = POINTS[name]
    original = getattr(owner, function)
    calls_to_live = 0

    def dying(*arguments, **options):
        nonlocal calls_to_live
        calls_to_live -= 1
        if calls_to_live < 0 and not after:
            raise Killed
        result = original(*arguments, **options)
        if calls_to_live < 0:
            raise Killed
        return result

    for first in range(calls):
        calls_to_live = first
        workdir = tmp_path / f"run{first}"
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, dying)
            # What dies in Orbax's thread is told as what could not be saved.
            with contextlib.suppress(Killed, NotWritable):
                train.train_and_evaluate(tiny(), str(workdir))
                pytest.fail("it did not die, or survived its death")
        train.train_and_evaluate(tiny(), str(workdir))
        assert_same(final(workdir), final(finished))
        assert json.loads((workdir / "evaluation.json").read_text())["step"] == 8


def test_metrics_are_no_state_of_the_loop(tiny, finished, tmp_path):
    want = final(finished)
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "metrics.jsonl").unlink()
    found = train.train_and_evaluate(tiny(), str(workdir))
    assert found == {k: v for k, v in want[1][-1].items() if k != "step"}
    assert lines_of(workdir) == [want[1][-1]]
    shutil.rmtree(workdir / "checkpoints" / "8")
    (workdir / "metrics.jsonl").unlink()
    train.train_and_evaluate(tiny(), str(workdir))
    assert (
        final(workdir)[1]
        == [m for m in want[1] if m["step"] > 4 or "eval/" in str(m)][1:]
    )


def test_a_finished_evaluation_is_not_repeated(tiny, finished, monkeypatch):
    def run(*_):
        pytest.fail("this was evaluated before")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Evaluator, "run", run)
        train.train_and_evaluate(tiny(), str(finished))
    (finished / "evaluation.json").write_text("{")
    before = final(finished)
    train.train_and_evaluate(tiny(), str(finished))
    assert json.loads((finished / "evaluation.json").read_text())["step"] == 8
    assert_same(final(finished), before)


def test_the_page_has_the_newest_evaluation(tiny, tmp_path, monkeypatch):
    write, steps = report.write, []

    def look_and_write(folder, evaluation):
        evaluated = [m["step"] for m in lines_of(folder) if "eval/recall@1" in m]
        steps.append((evaluation.content["step"], evaluated[-1]))
        return write(folder, evaluation)

    monkeypatch.setattr(report, "write", look_and_write)
    train.train_and_evaluate(tiny(), str(tmp_path))
    assert steps == [(0, 0), (4, 4), (8, 8)]  # the curves have it already
    assert "step 8" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("recall_at", [(2, 4), _slow((1,)), _slow((8, 1, 3))])
def test_other_ks_are_measured_anew(tiny, finished, recall_at):
    config = tiny()
    config.eval.recall_at = recall_at
    found = train.train_and_evaluate(config, str(finished))
    assert {k for k in found if k.startswith("eval/recall@")} == {
        f"eval/recall@{k}" for k in recall_at
    }


def test_it_trains_on_with_more_steps(tiny, finished, tmp_path):
    train.train_and_evaluate(tiny(steps=12), str(finished))
    train.train_and_evaluate(tiny(steps=12), str(tmp_path / "at once"))
    found, want = final(finished, 12), final(tmp_path / "at once", 12)
    assert_same(found, want)
    (line,) = (finished / "changes.jsonl").read_text().splitlines()
    change = {"step": 8, "field": "train.steps", "before": 8, "after": 12}
    assert json.loads(line) == change
    with pytest.raises(
        UserError, match="train.steps = 8, but .* is at step 12 already"
    ):
        train.train_and_evaluate(tiny(), str(finished))


def test_it_starts_from_another_run(tiny, finished, tmp_path):
    config = tiny()
    config.model.pretrained = str(finished)
    train.train_and_evaluate(config, str(tmp_path / "next"))
    first, last = lines_of(tmp_path / "next")[0], lines_of(finished)[-1]
    assert first == last | {"step": 0}
    # It is read once: without it, and from elsewhere, the run goes on.
    shutil.move(finished, tmp_path / "moved")
    shutil.rmtree(tmp_path / "next" / "checkpoints" / "8")
    train.train_and_evaluate(config, str(tmp_path / "next"))
    evaluate.measure_checkpoint(config, str(tmp_path / "next"))


def test_another_head_starts_at_random_and_another_body_is_refused(
    tiny, finished, tmp_path, caplog
):
    config = tiny()
    config.model.pretrained = str(finished)
    config.model.embedding_dim = 12
    caplog.set_level("INFO")
    train.train_and_evaluate(config, str(tmp_path / "next"))
    assert "new are head.bias, head.kernel" in caplog.text
    config.model.pretrained = str(tmp_path)
    with pytest.raises(UserError, match="is a folder without a run; give a file"):
        train.train_and_evaluate(config, str(tmp_path / "other"))


@pytest.mark.parametrize("value", ["gradient_norm", _slow("loss")])
def test_what_is_not_finite_is_not_saved(tiny, tmp_path, monkeypatch, value):
    """The newest checkpoint stays sound, and the advice of the message can be taken."""
    make = train_step.make_train_step

    def failing(*arguments, **options):
        step = make(*arguments, **options)

        def fail(state, batch):
            state, values = step(state, batch)
            # From step 6 on, unless the learning rate is the one that was advised.
            bad = (state.step >= 6) & (values["learning_rate"] > 1e-3)
            broken = jax.numpy.where(bad, jax.numpy.nan, values[value])
            params = jax.tree.map(
                lambda x: jax.numpy.where(bad, jax.numpy.nan, x), state.params
            )
            return state._replace(params=params), {**values, value: broken}

        return fail

    monkeypatch.setattr(train_step, "make_train_step", failing)
    with pytest.raises(
        checkpoints.NotFinite, match=f"{value.replace('_', ' ')} is nan at step 6"
    ) as error:
        train.train_and_evaluate(tiny(), str(tmp_path))
    assert "lower train.learning_rate or set train.clip_norm" in str(error.value)
    assert checkpoints.steps_in(tmp_path) == [4]
    with pytest.raises(checkpoints.NotFinite):
        train.train_and_evaluate(tiny(), str(tmp_path))
    train.train_and_evaluate(tiny(learning_rate=1e-4, clip_norm=1.0), str(tmp_path))
    assert checkpoints.steps_in(tmp_path) == [4, 8]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(final(tmp_path)[0]))


def test_a_signal_amid_steps_that_are_not_finite_saves_nothing(
    tiny, tmp_path, monkeypatch
):
    add = progress.Reporter.add

    def add_and_stop(self, step, arrays):
        if step == 6:
            arrays = {**arrays, "gradient_norm": jax.numpy.float32(jax.numpy.inf)}
        add(self, step, arrays)
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(progress.Reporter, "add", add_and_stop)
    with pytest.raises(checkpoints.NotFinite, match="gradient norm is inf at step 6"):
        train.train_and_evaluate(tiny(), str(tmp_path))
    assert checkpoints.steps_in(tmp_path) == [4]


@pytest.mark.parametrize("stop_at", [6, _slow(None)], ids=["second", "only"])
def test_sighup_while_a_checkpoint_is_written_does_not_lose_it(
    tiny, tmp_path, monkeypatch, stop_at
):
    """Neither the second one of a lost connection, nor one after the last step."""
    add, close = progress.Reporter.add, checkpoints.Checkpoints.close

    def add_and_stop(self, step, arrays):
        add(self, step, arrays)
        if step == stop_at:
            signal.raise_signal(signal.SIGHUP)

    def hang_up_and_close(self):
        signal.raise_signal(signal.SIGHUP)
        close(self)

    def die(*_):
        pytest.fail("nobody listened")

    monkeypatch.setattr(progress.Reporter, "add", add_and_stop)
    monkeypatch.setattr(checkpoints.Checkpoints, "close", hang_up_and_close)
    before = signal.signal(signal.SIGHUP, die)
    try:
        ends = pytest.raises(train.Interrupted) if stop_at else contextlib.nullcontext()
        with ends:
            train.train_and_evaluate(tiny(), str(tmp_path))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoints.steps_in(tmp_path) == [4, stop_at or 8]


def folder_of(config, photos):
    config.data.update(name="image_folder", path=str(photos))
    return config


def test_data_that_changed_is_refused(tiny, photos, tmp_path):
    images = shutil.copytree(photos, tmp_path / "photos")
    config = folder_of(tiny(), images)
    train.train_and_evaluate(config, str(tmp_path / "run"))
    # It may lie elsewhere.
    moved = shutil.move(images, tmp_path / "moved")
    config.data.path = str(moved)
    before = final(tmp_path / "run")
    train.train_and_evaluate(config, str(tmp_path / "run"))
    assert_same(final(tmp_path / "run"), before)
    (tmp_path / "moved" / "aaa").mkdir()
    image = Image.new("RGB", (20, 20))
    for number in range(8):
        image.save(tmp_path / "moved" / "aaa" / f"{number}.png")
    for use in (train.train_and_evaluate, report.evaluate_and_report):
        with pytest.raises(UserError, match="'aaa'.*Bring the data back"):
            use(config, str(tmp_path / "run"))
    assert_same(final(tmp_path / "run"), before)


def test_a_workdir_among_the_images_is_refused(tiny, photos):
    with pytest.raises(UserError, match="would be read as a class"):
        train.train_and_evaluate(folder_of(tiny(), photos), str(photos / "runs" / "x"))
    assert not (photos / "runs").exists()


def test_a_second_run_in_one_workdir_is_refused(tiny, finished, monkeypatch):
    def held(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = final(finished)
    monkeypatch.setattr(lock.fcntl, "lockf", held)
    with pytest.raises(UserError, match="another run is training in"):
        train.train_and_evaluate(tiny(steps=12), str(finished))
    assert_same(final(finished), before)
    report.evaluate_and_report(tiny(), str(finished))  # it changes no state


def test_evaluation_that_dies_leaves_no_step_evaluated(tiny, finished, monkeypatch):
    """The page is drawn first, as training would take an old one for the new."""
    (finished / "evaluation.json").unlink()

    def die(*_):
        raise SystemExit(9)

    monkeypatch.setattr(report, "write", die)
    with pytest.raises(SystemExit):
        report.evaluate_and_report(tiny(), str(finished))
    assert not (finished / "evaluation.json").exists()


def test_evaluation_leaves_a_running_save_alone(tiny, finished):
    left = finished / "checkpoints" / "12.orbax-checkpoint-tmp"
    shutil.copytree(finished / "checkpoints" / "8", left)
    report.evaluate_and_report(tiny(), str(finished))
    assert left.exists()


@pytest.mark.parametrize("limit", [6_000, _slow(3_000), _slow(20_000)])
def test_a_full_disk_ends_in_a_line_and_room_makes_it_good(
    tiny, finished, tmp_path, limit
):
    """No file may grow beyond the limit: metrics, checkpoints, or the page fail."""
    workdir = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(NotWritable, match="cannot write .*(M|m)ake room"):
            train.train_and_evaluate(tiny(), str(workdir))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if (workdir / "metrics.jsonl").exists():
        lines_of(workdir)  # each is whole
    train.train_and_evaluate(tiny(), str(workdir))
    assert_same(final(workdir), final(finished))


@pytest.mark.parametrize("steps", [[8], [4, 8]], ids=["newest", "all"])
def test_damaged_checkpoints(tiny, finished, tmp_path, steps, caplog):
    want = final(finished)
    for step in steps:
        folder = finished / "checkpoints" / str(step)
        largest = max(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        largest.write_bytes(b"")
    if len(steps) > 1:
        with pytest.raises(UserError, match="can be read: that of step 8 is damaged"):
            train.train_and_evaluate(tiny(), str(finished))
        return
    evaluation = evaluate.measure_checkpoint(tiny(), str(finished))
    assert evaluation.content["step"] == 4
    train.train_and_evaluate(tiny(), str(finished))
    assert "The checkpoint of step 8 is damaged" in caplog.text
    assert_same(final(finished), want)


@pytest.mark.campaign
def test_a_soak_grows_neither_memory_nor_descriptors(tiny, tmp_path):
    from soak import soak

    figures = soak(tiny, tmp_path, steps=2000)
    assert figures["descriptors"][-1] <= figures["descriptors"][0] + 2
    assert figures["rss_mb"][-1] < 1.05 * figures["rss_mb"][0] + 10
