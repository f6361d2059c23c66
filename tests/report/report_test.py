"""The page of a run: what is on it, and that nothing breaks it."""

import base64
import dataclasses
import html
import html.parser
import json
import re
import shutil

import matplotlib
import numpy as np
import pytest
from apply.conftest import AWKWARD
from command_line import run
from matplotlib.axes import Axes

from abe_jax import data, evaluate, report, retrieval
from abe_jax.report import attention, findings, page, plots
from abe_jax.workdir import NotWritable, config_files


class Page(html.parser.HTMLParser):
    """Tags that are open at the end, pictures without words, and what is fetched."""

    def __init__(self, path):
        super().__init__()
        self.open, self.without_alt, self.fetched, self.anchors = [], 0, [], set()
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors.add(values.get("id"))
        self.without_alt += tag == "img" and not values.get("alt")
        for name in ("src", "href", "xlink:href"):
            link = values.get(name) or ""
            if link and not link.startswith(("data:", "#")):
                self.fetched.append(link)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass


def test_the_page_is_whole_and_by_itself(workdir, evaluation):
    path = report.write(workdir, evaluation)
    parsed = Page(path)
    assert parsed.open == [] and parsed.without_alt == 0 and parsed.fetched == []
    for anchor in re.findall(r'href="#(\w+)"', parsed.text):
        assert anchor in parsed.anchors
    ids = re.findall(r' id="([^"]+)"', parsed.text)
    assert len(ids) == len(set(ids))
    assert path.stat().st_size < 10 * 2**20
    assert "ensemble, untrained" in parsed.text and "0.100" in parsed.text
    # To the very last evaluation.
    assert "at the end: ensemble 0.200" in parsed.text
    assert "loss 2.000" in parsed.text
    for word in ("head", "beak", "tail", "learner 1", "jax", "zero_shot"):
        assert word in parsed.text


def test_never_seen_is_said_of_new_classes_only(workdir, evaluation, monkeypatch):
    said = {}
    for zero_shot in (True, False):
        monkeypatch.setitem(evaluation.content["protocol"], "zero_shot", zero_shot)
        said[zero_shot] = report.write(workdir, evaluation).read_text()
    assert "classes that were never seen in training" in said[True]
    assert "known classes" not in said[True]
    assert "classes that were never seen in training" not in said[False]
    assert "known classes" in said[False]


def test_the_same_twice(workdir, evaluation):
    first = report.write(workdir, evaluation).read_bytes()
    assert report.write(workdir, evaluation).read_bytes() == first


def test_hardest_failures_come_first(evaluation):
    found = findings.nearest(evaluation, 8)
    flat = evaluation.embeddings.reshape(len(evaluation.embeddings), -1)
    labels = evaluation.queries.labels
    similarities = flat @ flat.T / 2
    np.fill_diagonal(similarities, -np.inf)
    same = labels[:, None] == labels
    best = np.where(same, similarities, -np.inf).max(axis=1)
    wrong = np.where(same, -np.inf, similarities).max(axis=1)
    np.testing.assert_allclose(found.best, best, atol=1e-6)
    hardest = found.hardest()
    assert set(hardest) == set(np.flatnonzero(wrong > best))
    lead = (wrong - best)[hardest]
    assert (np.diff(lead) <= 1e-6).all()
    recall = 1 - len(hardest) / len(labels)
    assert recall == pytest.approx(evaluation.content["recall"]["1"], abs=1e-6)


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("different", [1, 2, 4, 20])
def test_a_query_fails_where_recall_at_1_says_so(evaluation, different, gallery):
    """Many embeddings are equal, and their products are not, by rounding."""
    rng = np.random.default_rng(different)
    rows = rng.normal(size=(different, 2, 33)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    images, labels = evaluation.queries, evaluation.queries.labels
    left = right = rng.integers(0, different, len(images))
    others = {}
    if gallery:
        right = rng.integers(0, different, len(images))
        others = {"gallery_embeddings": rows[right], "gallery_labels": labels}
    changed = dataclasses.replace(
        evaluation,
        embeddings=rows[left],
        gallery=(images, rows[right]) if gallery else None,
    )
    found = findings.nearest(changed, 8)
    flat = rows.reshape(different, -1).astype(np.float64)
    similarities = (flat @ flat.T)[left][:, right]
    if not gallery:
        np.fill_diagonal(similarities, -np.inf)
    same = labels[:, None] == labels
    best = np.where(same, similarities, -np.inf).max(axis=1)
    wrong = np.where(same, -np.inf, similarities).max(axis=1)
    np.testing.assert_array_equal(found.wrong, wrong >= best)
    recall = retrieval.recall_at_k(rows[left], labels, [1], **others)[1]
    assert 1 - found.wrong.mean() == pytest.approx(recall)


def test_ties_count_against_the_query(evaluation):
    images, labels = evaluation.queries, evaluation.queries.labels
    first, second = (np.flatnonzero(labels == x)[:2] for x in np.unique(labels)[:2])
    four = data.Subset(images.source, images.indices[[*first, *second]])
    a, b = evaluation.embeddings[:2]
    changed = evaluate.Evaluation(
        evaluation.content, four, np.stack([a, a, a, b]), None
    )
    found = findings.nearest(changed, 3)
    assert set(found.hardest()) == {0, 1, 2, 3}
    confused = findings.confusions(changed, found, 9)
    assert sorted(number for _, _, number, _ in confused) == [2, 2]
    assert all(query != other for query, other, _, _ in confused)


def test_cosines_are_those_of_the_evaluation(evaluation):
    cosines = findings.cosines(evaluation)
    diversity = evaluation.content["diversity"]
    means = [float(values.mean()) for values in cosines.values()]
    expected = [
        diversity["self_cosine"]["mean"],
        diversity["positive_cosine"],
        diversity["negative_cosine"],
    ]
    np.testing.assert_allclose(means, expected, atol=1e-5)


def test_masks_on_parts(evaluation):
    """A mask that is one part, by hand, is at that part and at no other."""
    images, _ = evaluation.masks
    birds = images.source.source
    size = 32
    fake = np.zeros((len(images), 2, size, size, 1), np.float32)
    for i, index in enumerate(images.indices):
        fake[i, 0, ..., 0] = birds.part_masks(int(index))[4, 4:36, 4:36] + 1e-6
        fake[i, 1] = 1
    found = attention.parts(images, fake, size)
    assert found is not None
    names, shares = found
    assert names[4] == "tail" and shares[0, 4] > 5
    assert shares[0, :4].max() < 0.2
    np.testing.assert_allclose(shares[1], 1, atol=1e-6)


class Awkward:
    """Images whose classes and files have the names that break pages."""

    storage = "here"

    def __init__(self, source):
        self._source = source
        self.labels = source.labels
        names = [name.decode("utf-8", "surrogateescape") for name in AWKWARD]
        names += ["$x_1", "_hidden", "</script><script>alert(1)</script>"]
        self.class_names = tuple(
            f"{names[i % len(names)]}{i}" for i in range(len(source.class_names))
        )
        self.names = [f"{self.class_names[label]}/1.png" for label in self.labels]

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[index]


def test_names_do_not_break_the_page(workdir, evaluation):
    queries = evaluation.queries
    source = Awkward(queries.source)
    changed = evaluate.Evaluation(
        evaluation.content,
        data.Subset(source, queries.indices),
        evaluation.embeddings,
        None,
        (data.Subset(source, evaluation.masks[0].indices), evaluation.masks[1]),
    )
    parsed = Page(report.write(workdir, changed))
    assert parsed.open == [] and parsed.text.count("<script>") == 1
    assert "and <b>" not in parsed.text


def test_a_gallery_of_its_own_and_one_learner(workdir, evaluation):
    content = json.loads(json.dumps(evaluation.content))
    parts = [
        data.Subset(evaluation.queries.source, evaluation.queries.indices[rows])
        for rows in (slice(0, None, 2), slice(1, None, 2))
    ]
    one = evaluation.embeddings[:, :1]
    content["learners"] = content["learners"][:1]
    changed = evaluate.Evaluation(content, parts[0], one[::2], (parts[1], one[1::2]))
    parsed = Page(report.write(workdir, changed))
    assert parsed.open == [] and "attention" not in parsed.anchors
    assert "two learners, one image" not in parsed.text
    assert "How the learners differ" not in parsed.text and "Cosines" in parsed.text
    hardest = findings.nearest(changed, 8).hardest()[:16].tolist()
    queries = {*hardest, *data.evenly(len(parts[0]), 8).tolist()}
    shown = re.findall(r'<figure class="(\w+)"[^>]* title="([^"]+)"', parsed.text)
    asked = [name for kind, name in shown if kind == "asked"]
    assert set(asked) == {parts[0].names[query] for query in queries}
    assert len(asked) == len(queries) and len(shown) == (1 + 8) * len(queries)
    assert {name for kind, name in shown if kind != "asked"} <= set(parts[1].names)


def test_pictures_stay_within_their_bound():
    pictures = page.Pictures(limit=10_000)
    noise = np.random.default_rng(0).integers(0, 256, (500, 300, 3), dtype=np.uint8)
    url = pictures.url(noise)
    while not pictures.full:
        url = pictures.url(noise)
    kind, content = url.split(",")
    assert kind == "data:image/jpeg;base64" and len(base64.b64decode(content)) < 20_000


def test_plots_follow_the_page():
    text = plots.curves({"a": [(0, 1.0), (5, 2.0)], "none": []}, "Loss")
    assert "currentColor" in text and "#000000" not in text
    assert text.startswith("<svg") and ">a<" in text and ">none<" not in text


def test_plots_are_the_same_whatever_a_users_matplotlibrc(monkeypatch):
    lines = {"a": [(0, 1.0), (5, 2.0)]}
    expected = plots.curves(lines, "Loss")
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "#123456")
    assert plots.curves(lines, "Loss") == expected
    assert matplotlib.rcParams["text.usetex"]


def test_histograms_leave_no_pair_out(monkeypatch):
    """The cosines of collapsed learners are 1, and by rounding a little more."""
    row = np.random.default_rng(1).normal(size=(1, 64)).astype(np.float32)
    rows = np.repeat(row / np.linalg.norm(row), 1000, axis=0)
    cosines = (rows @ rows.T)[np.triu_indices(1000, 1)]
    assert cosines.max() > 1
    drawn, stairs = [], Axes.stairs

    def draw(axes, values, *args, **kwargs):
        drawn.append(values)
        return stairs(axes, values, *args, **kwargs)

    monkeypatch.setattr(Axes, "stairs", draw)
    plots.histograms({"alike": cosines, "opposite": -cosines})
    assert [float(values.sum()) for values in drawn] == pytest.approx([1, 1])


def test_names_in_a_plot_are_left_as_they_are():
    names = ['a id="x" href="#y" #010203', "url(#z) <b> & more"]
    text = plots.scatter(np.zeros((2, 2)), np.arange(2), names)
    for name in names:
        assert f"> {html.escape(name, quote=False)}</text>" in text
    assert text.count("#010203") == 1 and "currentColor" in text
    tags = "".join(re.findall(r"<[^>]*>", text))
    named = set(re.findall(r' id="(map-[^"]+)"', tags))
    meant = set(re.findall(r'(?:url\(|href=")#([^")]+)', tags))
    assert meant and meant <= named


@pytest.mark.slow
def test_the_mode(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    (copy / "report.html").unlink(missing_ok=True)
    status, output, errors = run(f"--workdir={copy}", "--mode=report")
    assert status == 0, errors
    assert output.splitlines() == [str(copy / "report.html")]
    assert "R@1" in (copy / "report.html").read_text()
    assert not (copy / "evaluation.json").exists()


def test_the_curve_of_any_loss_is_there(workdir, evaluation, tmp_path):
    copied = shutil.copytree(workdir, tmp_path / "run")
    lines = [{"step": step, "train/multi_similarity": 0.5 / step} for step in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (copied / "metrics.jsonl").write_text(text)
    assert "multi_similarity 0.250" in report.write(copied, evaluation).read_text()


def test_the_papers_recall_stands_in_no_other_column(evaluation, monkeypatch):
    hits = evaluate.Metric("H@{k}", lambda result: result.recall)
    monkeypatch.setitem(evaluate.METRICS, "hits", hits)
    content = json.loads(json.dumps(evaluation.content))
    content["protocol"]["data"] = "cub200"
    for part in (content, content["mean_learner"], *content["learners"]):
        part["hits"] = part["recall"]
    table = report._table(content, [])
    (paper,) = [row for row in table["rows"] if "in the paper" in row["name"]]
    cells = dict(zip(table["titles"], paper["cells"], strict=True))
    assert cells["R@1"] == "0.606" and cells["H@1"] == ""
    content["protocol"]["box_crop"] = True
    (paper,) = [r for r in report._table(content, [])["rows"] if "paper" in r["name"]]
    assert paper["cells"][0] == "0.706" and set(paper["cells"][1:]) == {""}


def test_other_data_stands_beside_nothing_of_the_run(workdir, evaluation):
    content = json.loads(json.dumps(evaluation.content))
    content["protocol"]["other_data"] = "elsewhere"
    other = dataclasses.replace(evaluation, content=content)
    text = report.write(workdir, other).read_text()
    assert "ensemble, untrained" not in text and "at the end: ensemble" not in text
    assert "loss 2.000" in text
    assert "ensemble, untrained" in report.write(workdir, evaluation).read_text()


@pytest.mark.parametrize("block", [1, 3])
def test_large_classes_are_compared_in_blocks(evaluation, block, monkeypatch):
    expected = findings.nearest(evaluation, 3)
    monkeypatch.setattr(findings, "_BLOCK", block)
    found = findings.nearest(evaluation, 3)
    np.testing.assert_allclose(found.best, expected.best, rtol=1e-6)


def test_a_page_that_cannot_be_written_is_one_line(workdir, evaluation, tmp_path):
    copied = shutil.copytree(workdir, tmp_path / "run")
    (copied / "report.html").unlink(missing_ok=True)
    (copied / "report.html").mkdir()
    with pytest.raises(NotWritable, match="cannot write to --workdir"):
        report.write(copied, evaluation)


def test_a_result_that_cannot_be_kept_is_shown(workdir, monkeypatch, capsys):
    def refuse(*_):
        raise NotWritable("cannot write to --workdir")

    monkeypatch.setattr(report, "write", refuse)
    with pytest.raises(NotWritable):
        report.evaluate_and_report(config_files.of_workdir(workdir), str(workdir))
    assert "ensemble" in capsys.readouterr().out
