"""`report.html`: the page that ends a run, drawn from its folder and an evaluation."""

import importlib.metadata
import pathlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import markupsafe
import numpy as np

import abe_jax
from abe_jax import data, evaluate, losses, processes
from abe_jax.data.datasets.tree import printable
from abe_jax.evaluate import METRICS, Evaluation, measure_checkpoint
from abe_jax.report import attention, findings, page, plots
from abe_jax.workdir import CONFIG_FILE, REPORT_FILE, locate, metrics

_NUM_HARDEST, _NUM_EVEN = 16, 8  # queries in the gallery
_NUM_MATCHES = 8  # pictures of each

# Recall of ABE-8^512 (Kim et al., ECCV 2018, tables 3 to 6).
_PAPER = {
    "cub200": {"1": 0.606, "2": 0.715, "4": 0.798, "8": 0.874},
    "cars196": {"1": 0.852, "2": 0.905, "4": 0.940, "8": 0.961},
    "sop": {"1": 0.763, "10": 0.884, "100": 0.948, "1000": 0.982},
    "inshop": {
        **{"1": 0.873, "10": 0.967, "20": 0.979},
        **{"30": 0.982, "40": 0.985, "50": 0.987},
    },
}
_PAPER_CROPPED = {"cub200": {"1": 0.706}, "cars196": {"1": 0.930}}

_RATE, _START = "train/images_per_second", "train/seconds_to_first_step"

_MEANINGS = {
    "gain": "Recall@1 of the ensemble minus that of its mean learner",
    "gain_of_errors": "the gain as a share of the mean learner's errors",
    "self_cosine": "of two learners on one image: mean (5% to 95%)",
    "self_cosine_centred": "the same, each learner's mean embedding taken off",
    "positive_cosine": "of one learner on two images of a class",
    "negative_cosine": "of one learner on images of two classes",
    "similarity_correlation": "of two learners' similarities over the same pairs",
    "neighbour_overlap": "share of the 10 nearest that two learners have in common",
    "shared_errors": "share of the queries that two learners both get wrong",
    "shared_errors_if_independent": "what it would be if their errors were independent",
    "mask_correlation": "of two learners' masks: within channels; of their means",
}


def evaluate_and_report(config, workdir: str, step: int | None = None) -> None:
    """Measures a checkpoint, prints its table, writes the page and `evaluation.json`.

    Args and errors are those of `evaluate.measure_checkpoint`.
    """
    evaluation = measure_checkpoint(config, workdir, step)
    if processes.is_first():
        # First, as the workdir may be one that cannot be written to.
        evaluate.show(evaluation.content)
        write(locate(workdir), evaluation)
        # Last, as in training: it says that the step is evaluated.
        evaluate.write(locate(workdir), evaluation.content)


def remake(config, workdir: str, step: int | None = None) -> None:
    """Measures a checkpoint and draws the page again: `--mode=report`.

    Args and errors are those of `evaluate.measure_checkpoint`.
    """
    evaluation = measure_checkpoint(config, workdir, step)
    if processes.is_first():
        print(write(locate(workdir), evaluation))


def write(workdir: pathlib.Path, evaluation: Evaluation) -> pathlib.Path:
    """Writes `report.html`, one file that needs no other.

    Args:
      workdir: of the run; its config and its metrics, to the last line, are read.
      evaluation: what is shown.

    Returns:
      path of the file.
    """
    content = evaluation.content
    lines = metrics.read(workdir)
    # Evaluations of other data stand beside none of the run's own.
    own = lines if "other_data" not in content["protocol"] else []
    pictures = page.Pictures()
    found = findings.nearest(evaluation, _NUM_MATCHES)
    hardest = found.hardest()
    plane = findings.plane(evaluation, 12)
    masks = _attention(evaluation, pictures)
    recall = content["recall"]
    first = next(iter(recall))
    sections = [
        *[("result", "Result"), ("training", "Training"), ("diversity", "Learners")],
        ("queries", "Queries"),
        *([("attention", "Attention")] if masks else []),
        *[("confusions", "Confusions"), ("map", "Map"), ("run", "Run")],
    ]
    path = workdir / REPORT_FILE
    page.write(
        path,
        "report.html",
        title=f"Recall@{first} {recall[first]:.3f}",
        summary=_summary(content),
        sections=sections,
        table=_table(content, own),
        protocol=list(content["protocol"].items()),
        curves=list(_curves(lines, own, first)),
        ensemble=len(content["learners"]) > 1,
        diversity=_diversity(content["diversity"]),
        histogram=_histogram(evaluation),
        gallery_note=_gallery_note(len(hardest), content),
        queries=list(_gallery(evaluation, found, hardest, pictures)),
        attention=masks,
        confusions=[
            (printable(query), printable(other), number, size)
            for query, other, number, size in findings.confusions(evaluation, found, 15)
        ],
        map={
            "svg": markupsafe.Markup(
                plots.scatter(
                    plane.points, plane.labels, list(map(printable, plane.names))
                )
            ),
            "alt": "Embeddings in the plane, coloured by class",
            "caption": f"{len(plane.points):,} images by their two principal components"
            f", which hold {plane.share:.0%} of the variance; {len(plane.names)} "
            "classes are told apart, the others are grey.",
        },
        run=list(_run(lines, content)),
        config=_config(workdir),
    )
    return path


def _summary(content: dict) -> str:
    unseen = content["protocol"]["zero_shot"]
    which = "classes that were never seen in training" if unseen else "known classes"
    return (
        f"{content['num_queries']:,} queries of {which}, among "
        f"{content['num_gallery']:,} images; step {content['step']:,}."
    )


def _table(content: dict, lines: list[dict]) -> dict[str, Any]:
    """A row for each learner, their mean, the ensemble, and what it compares with."""
    names = {}
    for base, metric in METRICS.items():
        values = content[base]
        ks = values if isinstance(values, dict) else [None]
        names |= {(base, k): metric.title.format(k=k) for k in ks}

    def cells(part: dict) -> list[str]:
        values = (part[base] if k is None else part[base].get(k) for base, k in names)
        return ["" if value is None else f"{value:.3f}" for value in values]

    untrained = next((m for m in lines if m["step"] == 0 and "eval/map_at_r" in m), {})
    before = [
        untrained.get(f"eval/{base}" if k is None else f"eval/{base}@{k}")
        for base, k in names
    ]
    rows = [
        {"name": f"learner {m}", "cells": cells(learner), "main": False}
        for m, learner in enumerate(content["learners"])
    ]
    rows += [
        {
            "name": "mean learner",
            "cells": cells(content["mean_learner"]),
            "main": False,
        },
        {"name": "ensemble", "cells": cells(content), "main": True},
    ]
    if untrained:
        figures = ["" if value is None else f"{value:.3f}" for value in before]
        rows.append({"name": "ensemble, untrained", "cells": figures, "main": False})
    note = "The paper has no figures of this data set."
    protocol = content["protocol"]
    figures_of = _PAPER_CROPPED if protocol["box_crop"] else _PAPER
    if published := figures_of.get(protocol["data"]):
        of = [
            f"{published[k]:.3f}" if base == "recall" and k in published else ""
            for base, k in names
        ]
        rows.append({"name": "ABE-8^512 in the paper", "cells": of, "main": False})
        note = (
            "The paper: GoogLeNet, D = 512, test classes; compare the protocol below."
        )
    return {"titles": list(names.values()), "rows": rows, "note": note}


def _curves(
    lines: list[dict], evaluated: list[dict], k: str
) -> Iterator[tuple[str, str, Any]]:
    def points(name: str, lines: list[dict]) -> list[tuple[int, float]]:
        return [(m["step"], m[name]) for m in lines if name in m]

    names = "loss", *losses.METRIC_LOSSES, "divergence"
    of_losses = {name: points(f"train/{name}", lines) for name in names}
    recalls = {
        "ensemble": points(f"eval/recall@{k}", evaluated),
        "mean learner": points(f"eval/mean_learner/recall@{k}", evaluated),
    }
    for title, drawn in (("Loss", of_losses), (f"Recall@{k}", recalls)):
        ends = [f"{name} {p[-1][1]:.3f}" for name, p in drawn.items() if p]
        if ends:
            alt = f"{title} over the steps; at the end: {', '.join(ends)}"
            yield alt, alt, markupsafe.Markup(plots.curves(drawn, title))


def _diversity(values: dict[str, Any]) -> list[tuple[str, str, str]]:
    def text(value: Any) -> str:
        if isinstance(value, float | int):
            return f"{value:.3f}"
        if "mean" in value:
            return f"{value['mean']:.3f} ({value['p5']:.3f} to {value['p95']:.3f})"
        return "; ".join(f"{part:.3f}" for part in value.values())

    return [
        (name.replace("_", " "), text(value), _MEANINGS.get(name, ""))
        for name, value in values.items()
    ]


def _histogram(evaluation: Evaluation) -> dict[str, Any]:
    values = findings.cosines(evaluation)
    means = [f"{name} {v.mean():.2f}" for name, v in values.items() if len(v)]
    return {
        "svg": markupsafe.Markup(plots.histograms(values)),
        "alt": f"Histograms of cosines; means: {', '.join(means)}",
    }


def _gallery_note(failures: int, content: dict) -> str:
    if not failures:
        return "No query fails; here are some, evenly spread."
    number = min(failures, _NUM_HARDEST)
    return (
        f"Of {content['num_queries']:,} queries {failures:,} fail: an image of another "
        "class is as near as the best right one, or nearer. Here are the "
        f"{number} hardest, where it is nearer by most; then others, evenly spread."
    )


def _names_of(subset: data.Subset) -> Callable[[int], tuple[str, str]]:
    """A look-up of an image's name and class, by its position."""
    names, labels, classes = subset.names, subset.labels, subset.source.class_names

    def named(position: int) -> tuple[str, str]:
        return printable(names[position]), printable(classes[labels[position]])

    return named


def _gallery(
    evaluation: Evaluation,
    found: findings.Nearest,
    hardest: np.ndarray,
    pictures: page.Pictures,
) -> Iterator[page.Query]:
    queries, (others, _) = evaluation.queries, findings.searched(evaluation)
    even = data.evenly(len(queries), _NUM_EVEN).tolist()
    chosen = dict.fromkeys([*hardest[:_NUM_HARDEST].tolist(), *even])

    asking, answering = _names_of(queries), _names_of(others)

    def shot(query: int, rank: int) -> page.Shot:
        row, score = int(found.rows[query, rank]), float(found.scores[query, rank])
        name, label = answering(row)
        right = others.labels[row] == queries.labels[query]
        word, mark = ("right", "✓") if right else ("wrong", "✗")
        return page.Shot(
            url=pictures.url(others[row]),
            alt=f"match {rank + 1}, {word}, cosine {score:.3f}: {label}",
            caption=f"{score:.3f} {label}",
            name=name,
            kind=word,
            mark=mark,
        )

    for query in chosen:
        name, label = asking(query)
        best = float(found.best[query])
        known = f"best of its class {best:.3f}" if np.isfinite(best) else "alone"
        yield page.Query(
            heading=f"{label} ({known})",
            asked=page.Shot(
                pictures.url(queries[query]), f"query: {label}", "query", name
            ),
            found=[shot(query, rank) for rank in range(found.rows.shape[1])],
        )


def _attention(evaluation: Evaluation, pictures: page.Pictures) -> dict | None:
    if evaluation.masks is None:
        return None
    images, masks = evaluation.masks
    size = evaluation.content["protocol"]["image_size"]
    names, shares = attention.parts(images, masks, size) or ([], [])
    return {
        "learners": masks.shape[1],
        "means": [
            ("", row) for row in attention.means(images, masks, size, pictures, 6)
        ],
        "channels": [
            (f"channel {c}", row)
            for c, row in attention.channels(images, masks, size, pictures, 4)
        ],
        "parts": names,
        "shares": shares,
    }


def _run(lines: list[dict], content: dict) -> Iterator[tuple[str, str]]:
    rates = [line[_RATE] for line in lines if _RATE in line]
    if rates:
        yield "training", f"{np.median(rates):,.1f} images a second (median)"
    seconds = [line[_START] for line in lines if _START in line]
    if seconds:
        yield "first step ready after", f"{seconds[0]:,.0f} s"
    yield "step", f"{content['step']:,}"
    yield "abe_jax", abe_jax.__version__
    for name in ("jax", "flax", "numpy"):
        yield name, importlib.metadata.version(name)
    yield "Python", platform.python_version()


def _config(workdir: pathlib.Path) -> str:
    path = workdir / CONFIG_FILE
    return path.read_text() if path.exists() else ""
