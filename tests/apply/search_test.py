"""Searching the index of a folder."""

import functools
import gc
import os
import shutil
import signal
import sys
import weakref

import numpy as np
import pytest
from apply.conftest import NAMES
from command_line import run, start

import abe_jax
from abe_jax import retrieval
from abe_jax.apply import images, search
from abe_jax.apply.approximate import Graph
from abe_jax.apply.index import Index
from abe_jax.apply.trained import Trained
from abe_jax.errors import UserError
from abe_jax.report import page
from abe_jax.workdir import config_files


def test_a_run_is_found_from_any_folder(workdir, pictures, tmp_path, monkeypatch):
    copied = shutil.copytree(workdir, tmp_path / "run")
    (copied / "evaluation.json").write_text('{"protocol": {"data": "birds"}}')
    monkeypatch.chdir(tmp_path)
    model = abe_jax.load("run")
    monkeypatch.chdir(pictures)
    assert model.protocol == {"data": "birds"}
    monkeypatch.setenv("HOME", str(tmp_path))
    model.index(".")
    model.index(".", "~/i.npz")
    assert len(list((copied / "index").iterdir())) == 1
    assert (tmp_path / "i.npz").exists()
    assert sorted(path.name for path in pictures.iterdir() if path.is_dir()) == ["a"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": "no/such.png"}, "such.png' does not exist"),
        ({"learner": 2}, "learners 0 to 1"),
        ({"top_k": 0}, "at least 1"),
        ({"approximate": True}, "approximate search needs usearch: pip install"),
        ({"square": "squeeze"}, "holds a run of another config: data.square"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_work(
    changed, message, workdir, pictures, monkeypatch
):
    monkeypatch.setattr(Trained, "index", lambda *_: pytest.fail("it was indexed"))
    config = config_files.of_workdir(workdir)
    config.data.square = changed.pop("square", config.data.square)
    monkeypatch.setitem(sys.modules, "usearch.index", None)  # as if not installed
    asked = {"query": str(pictures), "top_k": 1, "learner": None, "approximate": False}
    with pytest.raises(UserError, match=message):
        search.search_images(
            config, workdir, images=str(pictures), step=None, **asked | changed
        )


def test_queries_are_those_that_were_there_at_first(
    workdir, pictures, tmp_path, monkeypatch, capsys
):
    """Though one comes and one goes while the folder is indexed."""
    run = shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "incoming").mkdir()
    for name in ("1.png", "2.png"):
        shutil.copy(pictures / "a" / "1.png", tmp_path / "incoming" / name)
    (tmp_path / "incoming" / "1.5.png").write_text("half a file")
    index = Trained.index

    def meanwhile(model, folder):
        shutil.copy(pictures / "a" / "1.png", tmp_path / "incoming" / "0.png")
        return index(model, folder)

    monkeypatch.setattr(Trained, "index", meanwhile)
    search.search_images(
        config_files.of_workdir(run),
        run,
        images=str(pictures),
        query=str(tmp_path / "incoming"),
        **{"top_k": 1, "learner": None, "approximate": False, "step": None},
    )
    output = capsys.readouterr()
    assert "cannot read 1.5.png as an image" in output.err
    printed = output.out.splitlines()
    assert [line for line in printed if line.endswith(".png")][::2] == [
        *("1.png", "2.png")
    ]
    assert "0.png" not in printed


def test_why_an_image_is_left_out_is_said(
    workdir, model, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(search, "Trained", lambda *_, **__: model)
    run = shutil.copytree(workdir, os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    (pictures / "broken.png").write_bytes(b"nothing")
    (pictures / "gone.png").symlink_to("nowhere")
    asked = {"images": str(pictures), "query": str(pictures / "a" / "1.png")}
    options = {"top_k": 1, "learner": None, "approximate": False, "step": None}
    errors = []
    for _ in range(2):
        search.search_images(model.config, run, **asked, **options)
        output = capsys.readouterr()
        errors.append(output.err)
        # As a terminal takes a name that is no UTF-8.
        assert output.out.endswith(r"/caf\xe9/search.html" + "\n")
    why = "left out: cannot read broken.png as an image: not an image of a known format"
    assert why in errors[0] and why not in errors[1]
    assert "left out: broken.png, as before" in errors[1]
    for text in errors:  # the system may let it be read the next time
        assert "left out: cannot read gone.png: [Errno 2]" in text
    assert "2 file(s) could not be read" in errors[1]


def test_a_reader_that_has_enough_is_no_error(workdir, pictures, tmp_path):
    run = shutil.copytree(workdir, tmp_path / "run")
    arguments = (f"--workdir={run}", "--mode=search", f"--images={pictures}")
    # As it is for most users: what is printed waits until the program ends.
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    with start(*arguments, f"--query={pictures}", env=buffered) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `| head` does, here at once
        errors = process.stderr.read()
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert process.returncode == 128 + signal.SIGPIPE
    assert (run / "search.html").exists()


def test_search_equals_a_plain_one(model, pictures, tmp_path):
    index = model.index(pictures, tmp_path / "i.npz")
    embeddings = model.embed(pictures)
    for learner in (None, 0, 1):
        rows = embeddings if learner is None else embeddings[:, [learner]]
        cosines = np.einsum("qmd,gmd->qg", rows, rows) / rows.shape[1]
        found = model.search(pictures, index, top_k=3, learner=learner)
        for name, cosine, matches in zip(NAMES, cosines, found, strict=True):
            assert matches[0].path == name
            assert matches[0].score == pytest.approx(1, abs=1e-5)
            best = np.argsort(-cosine)[:3]
            assert [match.path for match in matches] == [NAMES[i] for i in best]
            np.testing.assert_allclose(
                [match.score for match in matches], cosine[best], atol=1e-5
            )
    assert len(model.search(pictures / "a" / "1.png", index, top_k=100)[0]) == len(
        NAMES
    )


def test_the_gallery_goes_to_the_device_once(model, pictures, tmp_path, monkeypatch):
    from abe_jax import retrieval

    made, gallery = [], retrieval.Gallery
    monkeypatch.setattr(
        retrieval, "Gallery", lambda rows: made.append(0) or gallery(rows)
    )
    index = model.index(pictures, tmp_path / "i.npz")
    monkeypatch.setattr(Index, "paths", None)  # of millions of images, a long list
    for _ in range(3):
        model.search(pictures / "a" / "1.png", index)
    assert len(made) == 1


def test_a_dropped_index_frees_the_device(model, pictures, tmp_path):
    index = model.index(pictures, tmp_path / "i.npz")
    index.matches(index.embeddings[:1], 1)
    there, gallery = weakref.ref(index), weakref.ref(index._gallery(None))
    gc.disable()  # which would find it, at some later time
    try:
        del index
        assert there() is None and gallery() is None
    finally:
        gc.enable()


def test_the_page_stays_small(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "Pictures", functools.partial(page.Pictures, 1))
    index, query = model.index(pictures, tmp_path / "i.npz"), pictures / "a" / "1.png"
    results = model.search(query, index)
    search.write_page(
        tmp_path / "page.html", "title", images.find(query), index, results, "all"
    )
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/jpeg") == 1  # the query's
    assert text.count("cosine") >= len(NAMES)


@pytest.mark.peers
def test_approximate_search(model, pictures, tmp_path):
    """Of few images the graph misses none; it is read again, and made anew in time."""
    index = model.index(pictures, tmp_path / "i.npz")
    for learner in (None, 1):
        exact = model.search(pictures, index, top_k=3, learner=learner)
        found = model.search(
            pictures, index, top_k=3, learner=learner, approximate=True
        )
        assert [[m.path for m in row] for row in found] == [
            [m.path for m in row] for row in exact
        ]
        np.testing.assert_allclose(
            [m.score for row in found for m in row],
            [m.score for row in exact for m in row],
            atol=1e-5,
        )
        assert index.graph(learner).recall == 1
    again = model.index(pictures, tmp_path / "i.npz")
    assert again.graph(None).recall is None
    (pictures / "a" / "1.png").unlink()
    fewer = model.index(pictures, tmp_path / "i.npz")
    assert fewer.graph(None).recall == 1
    assert len(list(tmp_path.glob("i-all-*.usearch"))) == 1


@pytest.mark.peers
def test_a_graph_is_read_whole_and_tells_what_it_misses(tmp_path, monkeypatch):
    rows = np.eye(4, dtype=np.float32)
    scores, found = Graph(rows, tmp_path / "g").top_k(rows[:2], 6)
    assert (found[:, 0] == [0, 1]).all() and (found[:, 4:] == -1).all()
    assert (scores[:, 0] == 1).all() and np.isneginf(scores[:, 4:]).all()
    (file,) = tmp_path.iterdir()
    for stem in ("g[1]", "g-all"):  # of others; each replaces its own
        for other in (rows, rows[::-1]):
            Graph(other, tmp_path / stem)
    Graph(rows[::-1], tmp_path / "g"), Graph(rows, tmp_path / "g")
    assert len(list(tmp_path.iterdir())) == 3
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot read the graph .*delete it, and it"):
        Graph(rows, tmp_path / "g")
    monkeypatch.setattr(Graph, "_measure", lambda *_: pytest.fail("it was built"))
    with pytest.raises(UserError, match="cannot write the graph .*make room there"):
        Graph(rows, tmp_path / "nowhere" / "g")


@pytest.mark.peers
def test_a_damaged_graph_gives_no_wrong_scores(tmp_path):
    """Vectors in its file are not what is scored; rows that are not there are told."""
    rows = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    Graph(rows, tmp_path / "g")
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    changed = content.replace(rows[7].tobytes(), (100 * rows[7]).tobytes())
    assert changed != content
    file.write_bytes(changed)
    scores, found = Graph(rows, tmp_path / "g").top_k(rows[:9], 5)
    exact = np.sum(rows[:9, None] * rows[found], axis=2)
    np.testing.assert_allclose(scores, exact, atol=1e-6)
    assert (np.diff(scores) <= 0).all()
    shorter = Graph(rows, tmp_path / "g")
    shorter._rows = rows[:5]
    with pytest.raises(UserError, match="the graph .* is damaged; delete it, and it"):
        shorter.top_k(rows[:1], 10)


@pytest.mark.peers
def test_recall_is_of_other_rows(tmp_path, monkeypatch):
    """Any of equal rows will do; a row that finds itself alone has found none."""
    rows = np.repeat(np.eye(30, dtype=np.float32), 12, axis=0)
    find = Graph.top_k

    def find_last_of_equal(_, queries, k):
        # Exactly: usearch itself may miss some, and not the same each time.
        scores, backwards = retrieval.top_k(queries, rows[::-1], k)
        return scores, len(rows) - 1 - backwards

    monkeypatch.setattr(Graph, "top_k", find_last_of_equal)
    assert Graph(rows, tmp_path / "g").recall == 1
    monkeypatch.setattr(Graph, "top_k", lambda self, rows, k: find(self, rows, 1))
    alone = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    alone /= np.linalg.norm(alone, axis=1, keepdims=True)
    assert Graph(alone, tmp_path / "other").recall == 0
    assert Graph(alone[:1], tmp_path / "one").recall == 1


def test_mistakes(model, pictures, tmp_path):
    with pytest.raises(UserError, match="learners 0 to 1"):
        model.search(pictures, pictures, learner=2)
    with pytest.raises(UserError, match="top_k is 0; it must be at least 1"):
        model.search(pictures, pictures, top_k=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="no image of .* could be read: .*x.png as an"):
        model.index(tmp_path / "empty")


def test_the_mode(workdir, pictures, tmp_path):
    copied = shutil.copytree(workdir, tmp_path / "run")
    arguments = (f"--workdir={copied}", "--mode=search", f"--images={pictures}")
    query = pictures / "a" / "1.png"
    status, output, errors = run(*arguments, f"--query={query}", "--top_k=3")
    assert status == 0, errors
    lines = output.splitlines()
    assert lines[0].endswith(f"{len(NAMES)} embedded, 0 as before, 0 gone")
    assert lines[2] == "1.png"
    assert lines[3].split() == ["1", "1.0000", "a/1.png"]
    status, output, errors = run(*arguments, f"--query={pictures}", "--learner=1")
    assert status == 0, errors
    assert f"0 embedded, {len(NAMES)} as before, 0 gone" in output
    assert r"caf\xe9 latin-1.png" in output and r"line\x0abreak.png" in output
    (copied / "unwritten").write_bytes((copied / "search.html").read_bytes())
    (copied / "search.html").unlink()
    (copied / "search.html").mkdir()  # as where the workdir cannot be written to
    status, unwritten, errors = run(*arguments, f"--query={pictures}", "--learner=1")
    assert status == 1 and "search.html" in errors
    assert output.startswith(unwritten)
    page = (copied / "unwritten").read_text()
    assert page.count("<img") == len(NAMES) * (1 + len(NAMES))
    assert "and <b>" not in page
    assert "quote &#39; &#34; and &lt;b&gt;&amp;amp;.png" in page
    assert "🦜" in page and r"caf\xe9" in page
    assert "http" not in page.replace("http-equiv", "")
