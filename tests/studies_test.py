"""The study: its rows are configs, a run is one line, tables come from the lines."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from absl import app
from absl.testing import flagsaver
from tiny import replace_models
from train_test import small_config

from abe_jax import data, evaluate, models
from abe_jax.errors import UserError
from studies import figures, grid, limits, picture, run, tables


@pytest.mark.parametrize("row", grid.ROWS)
def test_a_row_changes_what_it_says_and_is_possible(row):
    for name in grid.DATA:
        config = grid.config_of(name, row, 3, "validation")
        flat = dict(_flat(config))
        assert grid.ROWS[row].overrides.items() <= flat.items()
        assert (flat["seed"], flat["data.validation_fraction"]) == (3, 0.2)
        models.check(config.model)


def _flat(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    def config_of(data, row, seed, part, path=None):
        config = small_config()
        config.seed = seed
        config.train.update(steps=2, eval_every=2)
        return config

    replace_models(monkeypatch)
    monkeypatch.setattr(grid, "config_of", config_of)
    monkeypatch.setattr(run, "RUNS_FILE", tmp_path / "runs.jsonl")
    return tmp_path


@pytest.mark.slow
def test_members_are_concatenated(tiny, monkeypatch):
    monkeypatch.setitem(grid.ROWS, "2 x abe", grid.Row({}, members=2))
    line = run.run("birds", "2 x abe", 0, "test", None, tiny)
    assert len(line["learners"]) == 4  # two models of two learners
    alone = run.run("birds", "abe-4", 1000, "test", None, tiny / "other")
    assert len(alone["learners"]) == 2
    assert not run.done("birds", "2 x abe", 0, "test")
    run.RUNS_FILE.write_text(json.dumps(line) + "\n")
    assert run.done("birds", "2 x abe", 0, "test")


def test_lines_go_to_a_file_of_ones_own_once(tmp_path):
    own = tmp_path / "again.jsonl"
    asked = {"data": "birds", "rows": ["1-head"], "seeds": ["0", "1"]}
    with flagsaver.flagsaver(**asked, lines=str(own)):
        for _ in range(2):
            run.add_lines(run.named, run.RUNS_FILE)
    assert [line["seed"] for line in run.read_lines(own)] == [0, 1]


def test_losses_of_a_run_are_means_of_sixths(tmp_path):
    logged = {1: 9.0, 50: 7.0, 100: 5.0, 101: 4.0, 150: 2.0, 500: 1.5, 600: 0.5}
    lines = [{"step": 0, "eval/recall@1": 0.5}]
    lines += [{"step": step, "train/loss": loss} for step, loss in logged.items()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert run.losses(str(tmp_path), 600) == [7.0, 3.0, 1.5, 0.5]


@pytest.mark.slow
def test_limits_are_measured_on_both_parts(tiny, monkeypatch):
    monkeypatch.setattr(limits, "PARTS", 2)  # of four classes
    line = run.run("birds", "abe-4", 0, "test", None, tiny)
    key = run.config_and_workdir("birds", "abe-4", 0, "test", None, tiny)
    found = limits.measure(*key)
    assert found["evaluated"] == line["recall"]["1"]
    assert found["evaluated_fifth"] >= found["evaluated"]  # fewer to be mistaken for
    splits = data.create(key[0].data)
    labels, names = splits.evaluation.labels, splits.evaluation.names
    pairs = [
        pathlib.PurePath(names[i]).stem == pathlib.PurePath(names[j]).stem
        for i, j in itertools.product(range(len(names)), repeat=2)
        if labels[i] != labels[j]
    ]
    np.testing.assert_allclose(found["same_artist"], np.mean(pairs))
    key[0].train.steps += 1
    with pytest.raises(UserError, match="is at step 2 of 3"):
        limits.measure(*key)


def test_limits_are_of_one_model():
    asked = {"data": "birds", "rows": ["3 x 1-head"], "seeds": ["0"]}
    with (
        flagsaver.flagsaver(**asked),
        pytest.raises(app.UsageError, match="'3 x 1-head' is of several models"),
    ):
        limits.main(None)


def test_wrong_neighbours_of_the_same_artist():
    rows = np.eye(6, dtype=np.float32)[[0, 0, 1, 1, 2, 2], None]

    class Part:
        # Pairs of equal rows: one class; two classes of one artist, and of two.
        labels = np.array([0, 0, 1, 2, 3, 4])
        names = ("a/x.png", "a/y.png", "b/x.png", "c/x.png", "d/x.png", "e/y.png")

    found = limits.by_artist(rows, Part())
    assert found["wrong_same_artist"] == 0.5
    # Of 14 pairs of images of two classes, 6 are both by x and 1 by y.
    assert found["same_artist"] == 7 / 14


def test_tables_have_mean_deviation_and_number():
    def line(row, seed, recall, mean):
        learner = {"recall": {"1": mean}, "map_at_r": mean / 2}
        diversity = {"gain": recall - mean, "self_cosine": {"mean": 0.25}}
        return {
            **{"data": "birds", "part": "test", "row": row, "seed": seed},
            **{"recall": {"1": recall}, "mean_learner": learner},
            "map_at_r": recall / 2,
            "diversity": diversity,
        }

    lines = [line("abe-4", seed, 0.9 - 0.1 * seed, 0.7) for seed in (2, 0, 1)]
    lines.append(line("1-head", 0, 0.5, 0.5))
    lines += [line("abe-8", seed, 0.7 + 0.1 * seed, 0.6) for seed in (1, 0)]
    page = "before\n<!-- runs birds test -->\nold\n<!-- end -->\nafter\n"
    filled = tables.fill(page, lines)
    rows = [row.split(" | ") for row in filled.splitlines()[4:7]]
    means = ["80.0 ± 10.0", "70.0 ± 0.0", "40.0 ± 5.0", "35.0 ± 0.0", "10.0 ± 10.0"]
    assert rows[0][:7] == ["| abe-4", "3", *means]
    assert rows[1][:3] == ["| 1-head", "1", "50.0"]
    assert rows[2][:3] == ["| abe-8", "2", "70.0, 80.0"]  # both, by their seeds
    assert rows[0][8] == "0.25 ± 0.00"
    assert tables.fill(filled, lines) == filled
    earlier = page.replace("runs birds test", "earlier")
    assert "| birds | test | 1-head | 1 |" in tables.fill(earlier, [], lines)
    assert "1-head" not in tables.fill(earlier, lines, [])
    assert filled.startswith("before\n") and filled.endswith("<!-- end -->\nafter\n")
    lines[0]["losses"] = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]  # older lines have none
    losses = tables.fill(page.replace("runs", "losses"), lines).splitlines()
    assert losses[4] == "| abe-4 | 1 | 6.00 | 5.00 | 4.00 | 3.00 | 2.00 | 1.00 |"
    assert losses[5] == "<!-- end -->"


def test_the_figure_has_what_the_lines_have(tmp_path):
    def line(row, recall, mean):
        learner = {"recall": {"1": mean}}
        own = {"data": "birds_fast", "part": "test", "row": row, "learners": [{}, {}]}
        return own | {"recall": {"1": recall}, "mean_learner": learner}

    lines = [
        line("abe-4", 0.8, 0.7),
        line("abe-4", 0.9, 0.6),
        line("8-heads", 0.5, 0.4),
    ]
    found = figures.by_learners(lines)
    assert {kind: list(of_kind) for kind, of_kind in found.items()} == {
        "ABE": [4],
        "M-heads": [8],
    }
    np.testing.assert_allclose(found["ABE"][4], [[80, 70], [90, 60]])
    lines.append({**lines[0], "part": "validation"})
    gains, tuned, learners = figures.draw(lines).axes
    assert not tuned.lines
    points = [p.get_offsets() for p in gains.collections if "birds" in p.get_label()]
    np.testing.assert_allclose(points[0], [[70, 10], [60, 30]])
    np.testing.assert_allclose(points[1], [[40, 10]])
    assert learners.get_legend_handles_labels()[1][0] == "ABE, ensemble"
    figures.main(tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("abe-8", "ABE"),
        ("pairs", "ABE"),
        ("lambda 64", "ABE"),
        ("lambda 0", "ABE, no L_div"),
        ("4-heads, L_div", "M-heads"),
        ("1-head, multi-similarity", None),
        ("3 x 1-head", None),
    ],
)
def test_the_curve_of_a_row(row, kind):
    assert figures.kind_of(row) == kind


def test_the_picture_frames_what_is_right_and_wrong():
    images = data.create(small_config().data).evaluation
    classes = np.unique(images.labels, return_inverse=True)[1]
    rows = np.eye(classes.max() + 1, dtype=np.float32)[classes]
    rows[0] = 0.6 * rows[0] + 0.8 * rows[-1]  # looks more like the last class
    evaluation = evaluate.Evaluation({}, images, rows[:, None], None)
    drawn = picture.draw(evaluation, images)
    height = drawn.height // 5 + 1
    frames = [
        [drawn.getpixel((x, line * height + 1)) for x in (1, 170, 312)]
        for line in range(5)
    ]
    green, red = (44, 160, 44), (214, 39, 40)
    assert [colours[0] for colours in frames] == [(90, 90, 90)] * 5
    assert [colours[1] for colours in frames] == [green] * 4 + [red]


def test_the_page_has_the_tables_of_the_committed_lines():
    page = tables.PAGE.read_text()
    earlier = run.read_lines(run.EARLIER_FILE)
    limited = run.read_lines(limits.FILE)
    assert tables.fill(page, run.read_lines(), earlier, limited) == page


def test_the_committed_lines_are_whole():
    for line in (*run.read_lines(), *run.read_lines(run.EARLIER_FILE)):
        assert line["row"] in grid.ROWS and line["data"] in grid.DATA
        assert 0 < line["recall"]["1"] <= 1 and line["commit"]
