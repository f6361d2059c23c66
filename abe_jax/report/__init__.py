"""The page that ends a run: its result, its curves, and what a query finds."""

import base64
import html
import io
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from abe_jax import data, evaluate, processes, retrieval
from abe_jax.workdir import REPORT_FILE
from abe_jax.workdir import metrics as metric_writer

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em;
  color: #222; background: #fff; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse }
th, td { padding: .25em .9em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
tr.ensemble { font-weight: bold }
.found img { width: 72px; height: 72px; margin: 2px; border: 4px solid #c33 }
.found img.query { border-color: #555; margin-right: 1.2em }
.found img.right { border-color: #2a2 }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto }
"""


def evaluate_and_report(config, workdir: str, step: int | None = None) -> None:
    """Measures a checkpoint, prints its table, writes `evaluation.json` and the page.

    Args and errors are those of `evaluate.evaluate_checkpoint`.
    """
    evaluation = evaluate.evaluate_checkpoint(config, workdir, step)
    if processes.is_first():
        write(pathlib.Path(workdir), evaluation)


def write(
    workdir: pathlib.Path,
    evaluation: evaluate.Evaluation,
    *,
    num_queries: int = 12,
    num_matches: int = 8,
) -> pathlib.Path:
    """Writes `report.html`, one file that needs no other.

    Args:
      workdir: of the run; its metrics are read.
      evaluation: what is shown.
      num_queries: how many queries are shown, spread evenly over the classes.
      num_matches: how many nearest images are shown for each.

    Returns:
      path of the file.
    """
    content, subset = evaluation.content, evaluation.queries
    embeddings, gallery = evaluation.embeddings, evaluation.gallery
    metrics = metric_writer.read(workdir)
    parts = [
        f"<h1>Recall@1 {content['recall']['1']:.3f}</h1>"
        if "1" in content["recall"]
        else "<h1>Retrieval</h1>",
        f"<p>{content['num_queries']} queries of classes that were "
        f"{'never seen in training' if content['protocol']['zero_shot'] else 'held'}"
        f", step {content['step']}.</p>",
        _table(content),
        "<h2>Training</h2>",
        _curve(metrics, "train/loss", "loss"),
        _curve(metrics, "eval/recall@1", "Recall@1 of the ensemble"),
        "<h2>What a query finds</h2><p>Left the query; then its nearest images, green "
        "where the class is the same.</p>",
        _gallery(subset, embeddings, gallery, num_queries, num_matches),
        "<h2>Protocol</h2>",
        f"<pre>{html.escape(json.dumps(content['protocol'], indent=2))}</pre>",
    ]
    path = workdir / REPORT_FILE
    path.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><title>abe_jax</title>"
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    return path


def _table(evaluation: dict) -> str:
    ks = list(evaluation["recall"])
    head = "".join(f"<th>R@{k}</th>" for k in ks) + "<th>MAP@R</th>"
    rows = [
        (f"learner {m}", learner) for m, learner in enumerate(evaluation["learners"])
    ]
    rows += [("mean learner", evaluation["mean_learner"]), ("ensemble", evaluation)]
    body = "".join(
        f"<tr class={name.split()[0]}><td>{name}</td>"
        + "".join(f"<td>{part['recall'][k]:.3f}</td>" for k in ks)
        + f"<td>{part['map_at_r']:.3f}</td></tr>"
        for name, part in rows
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _curve(metrics: Sequence[dict], name: str, title: str) -> str:
    """A line over the steps, as SVG."""
    points = [(m["step"], m[name]) for m in metrics if name in m]
    if len(points) < 2:
        return ""
    width, height, left, base = 640, 180, 60, 150
    xs, ys = np.array(points, float).T
    low, high = min(ys.min(), 0.0), ys.max()
    px = left + (xs - xs.min()) / max(np.ptp(xs), 1) * (width - left - 10)
    py = base - (ys - low) / max(high - low, 1e-9) * (base - 30)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(px, py, strict=True))
    return (
        f'<svg viewBox="0 0 {width} {height}" width={width} height={height} '
        'font-size=12 font-family="sans-serif" role=img>'
        f"<text x={left} y=16>{title}</text>"
        f"<text x=0 y=34>{high:.3g}</text><text x=0 y={base}>{low:.3g}</text>"
        f"<text x={left} y={base + 18}>step {xs.min():.0f}</text>"
        f'<text x={width - 10} y={base + 18} text-anchor="end">{xs.max():.0f}</text>'
        f'<path d="M{left} 30V{base}H{width - 10}" fill="none" stroke="#aaa"/>'
        f'<polyline points="{line}" fill="none" stroke="#26c" stroke-width=2 /></svg>'
    )


def _gallery(
    subset: data.Subset,
    embeddings: np.ndarray,
    gallery: tuple[data.Subset, np.ndarray] | None,
    num_queries: int,
    num_matches: int,
) -> str:
    flat = embeddings.reshape(len(embeddings), -1)
    searched, rows_of_searched = (subset, embeddings) if gallery is None else gallery
    rows_of_searched = rows_of_searched.reshape(len(rows_of_searched), -1)
    queries = np.linspace(0, len(flat) - 1, min(num_queries, len(flat)), dtype=int)
    # One more than shown, as a query among the searched finds itself.
    count = min(num_matches + 1, len(rows_of_searched))
    _, found = retrieval.top_k(flat[queries], rows_of_searched, count)
    labels, found_labels = subset.labels, searched.labels
    rows = []
    for query, matches in zip(queries, np.asarray(found), strict=True):
        others = [i for i in matches if gallery is not None or i != query]
        cells = [_picture(subset[query], "query")]
        cells += [
            _picture(
                searched[i], "right" if found_labels[i] == labels[query] else "wrong"
            )
            for i in others[:num_matches]
        ]
        rows.append(f"<div class=found>{''.join(cells)}</div>")
    return "".join(rows)


def _picture(pixels: np.ndarray, role: str) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((144, 144))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data_url = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class={role} alt="{role}" src="data:image/png;base64,{data_url}">'
