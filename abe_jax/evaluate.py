"""Embeds a part of the data and measures retrieval in it."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from abe_jax import (
    data,
    models,
    optimizer,
    parallel,
    processes,
    report,
    retrieval,
    train_step,
)
from abe_jax.errors import UserError
from abe_jax.workdir import checkpoints as checkpoint

EVALUATION_FILE = "evaluation.json"


class Evaluator:
    """Embeds the classes held out and measures retrieval among them."""

    def __init__(self, config, model: models.Embedder, splits: data.Splits, mesh: Mesh):
        """Compiles nothing yet; the first run does.

        Args:
          config: whole config.
          model: gives structure and preprocessing.
          splits: as of `data.create`; its `evaluation` part is measured.
          mesh: the devices.
        """
        self._config = config
        self._num_learners = model.num_learners
        self._splits = splits
        self._mesh = mesh
        self._embed = parallel.map_over_devices(
            train_step.make_embed_step(model, config.data.image_size),
            mesh,
            mapping=config.parallel.mapping,
            rows_out=True,
        )

    def run(
        self,
        state: train_step.TrainState,
        folder: pathlib.Path,
        check: Callable[[], None] = lambda: None,
    ) -> dict:
        """Measures a state, and writes `evaluation.json` and `report.html`.

        Args:
          state: replicated over the mesh.
          folder: workdir of the run.
          check: called before every batch; may raise to stop.

        Returns:
          the content of `evaluation.json`; process 0 writes it.

        Raises:
          UserError: as of `measure`.
        """
        subset, gallery = self._splits.evaluation, self._splits.gallery
        embeddings = self.embed(state, subset, check)
        others = None
        if gallery is not None:
            others = (self.embed(state, gallery, check), gallery.labels)
        evaluation = {
            "step": int(state.step),
            **measure(embeddings, subset.labels, self._config.eval.recall_at, others),
            "protocol": _protocol(self._config, self._splits, self._num_learners),
        }
        if processes.is_first():
            text = json.dumps(evaluation, indent=2) + "\n"
            (folder / EVALUATION_FILE).write_text(text)
            shown = None if gallery is None or others is None else (gallery, others[0])
            report.write(folder, evaluation, subset, embeddings, gallery=shown)
        return evaluation

    def embed(
        self,
        state: train_step.TrainState,
        subset: data.Subset,
        check: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Embeds every image of a part once: float32 `[n, M, D/M]`, in its order.

        Every process gets all of them.
        """
        # By device: a program of one shape rounds an image the same way everywhere.
        batch_size = self._config.eval.batch_size * self._mesh.size
        reading = data.Reading.of_process(self._config.data, *processes.place())
        parts: list[np.ndarray] = []
        pending: jax.Array | None = None
        for batch in data.evaluation_batches(subset, batch_size, reading):
            check()
            images = parallel.split_rows(batch["image"], self._mesh)
            rows = self._embed((state.params, state.model_state), images)
            # Fetched a batch late, so that the device always has work.
            if pending is not None:
                parts.append(processes.gather_rows(pending))
            pending = rows
        if pending is not None:
            parts.append(processes.gather_rows(pending))
        # The images come in order; only the end of the last batch is padding.
        return np.concatenate(parts)[: len(subset)]


def evaluate_checkpoint(config, workdir: str, step: int | None = None) -> dict:
    """Restores a run's checkpoint, measures it and prints the table.

    Writes `evaluation.json` and `report.html`.

    Args:
      config: of the run.
      workdir: folder of the run.
      step: which checkpoint; the newest by default.

    Returns:
      the content of `evaluation.json`.

    Raises:
      UserError: no such run or checkpoint, or one of another config.
    """
    folder = pathlib.Path(workdir)
    checkpoint.require_run(folder, config)
    model = models.create(config.model, rngs=nnx.Rngs(config.seed))
    splits = data.create(config.data)
    mesh = parallel.make_mesh()
    optimiser, _ = optimizer.create(config.train)
    state = train_step.initial_state(model, optimiser)
    with contextlib.closing(checkpoint.Checkpoints(folder)) as checkpoints:
        state = checkpoints.restore(state, mesh, step)
    evaluation = Evaluator(config, model, splits, mesh).run(state, folder)
    if processes.is_first():
        columns = {f"step {evaluation['step']}": scalars(evaluation)}
        print(table(columns, len(evaluation["learners"])))
    return evaluation


def measure(
    embeddings: np.ndarray,
    labels: np.ndarray,
    recall_at: Iterable[int],
    gallery: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict:
    """Recall@K and MAP@R of the ensemble, of each learner, and their mean.

    Args:
      embeddings: float32 `[n, M, D/M]`, unit length per learner.
      labels: integer `[n]`.
      recall_at: the values of K.
      gallery: embeddings `[g, M, D/M]` and labels `[g]` that the queries are looked for
        in; None where the queries are each other's gallery.

    Returns:
      the fields of `evaluation.json` that speak of retrieval.

    Raises:
      UserError: no query has another image of its class, K is larger than the gallery,
        or an embedding is not finite.
    """
    ks = tuple(recall_at)
    index, count = processes.place()
    # Every process asks its share of the queries.
    share = (index * len(labels) // count, (index + 1) * len(labels) // count)

    def one(rows: np.ndarray, others: np.ndarray | None) -> retrieval.RetrievalResult:
        try:
            part = retrieval.evaluate_retrieval(
                rows,
                labels,
                ks,
                gallery_embeddings=others,
                gallery_labels=None if gallery is None else gallery[1],
                query_range=share,
            )
        except ValueError as error:
            raise UserError(f"the evaluation failed: {error}") from error
        return _together(part)

    def fields(result: retrieval.RetrievalResult) -> dict:
        return {
            "recall": {str(k): result.recall[k] for k in ks},
            "map_at_r": result.map_at_r,
        }

    # The squared distance of the concatenation is the sum over the learners.
    everyone = None if gallery is None else gallery[0].reshape(len(gallery[0]), -1)
    ensemble = one(embeddings.reshape(len(embeddings), -1), everyone)
    learners = [
        fields(one(embeddings[:, m], None if gallery is None else gallery[0][:, m]))
        for m in range(embeddings.shape[1])
    ]
    return {
        "num_queries": ensemble.num_queries,
        "num_gallery": ensemble.num_gallery,
        "num_lone_queries": ensemble.num_lone_queries,
        **fields(ensemble),
        "learners": learners,
        "mean_learner": {
            "recall": {
                k: float(np.mean([m["recall"][k] for m in learners]))
                for k in learners[0]["recall"]
            },
            "map_at_r": float(np.mean([m["map_at_r"] for m in learners])),
        },
    }


def _together(part: retrieval.RetrievalResult) -> retrieval.RetrievalResult:
    """The result of all queries from those of the processes' shares."""
    if processes.place()[1] == 1:
        return part
    sums = part.num_queries * np.array([part.map_at_r, part.r_precision])
    counts = np.array([part.num_queries, part.num_lone_queries, *part.hits.values()])
    sums = processes.gather(sums).sum(axis=0)
    number, lone, *hits = (int(n) for n in processes.gather(counts).sum(axis=0))
    if not number:
        raise UserError(
            "the evaluation failed: no query has another image of its class."
        )
    return retrieval.RetrievalResult(
        recall={k: n / number for k, n in zip(part.hits, hits, strict=True)},
        hits=dict(zip(part.hits, hits, strict=True)),
        map_at_r=float(sums[0] / number),
        r_precision=float(sums[1] / number),
        num_queries=number,
        num_gallery=part.num_gallery,
        num_lone_queries=lone,
    )


def _protocol(config, splits: data.Splits, num_learners: int) -> dict:
    """What a number must be reported with."""
    return {
        "data": config.data.name,
        "split": splits.evaluation_name,
        "zero_shot": splits.zero_shot,
        "num_classes": len(np.unique(splits.evaluation.labels)),
        "trunk": config.model.trunk,
        "width": config.model.width,
        "num_learners": num_learners,
        "embedding_dim": config.model.embedding_dim,
        "image_size": config.data.image_size,
        "crop": "centre",
        "square": config.data.square,
        "box_crop": config.data.box_crop,
        "gallery": "the other queries"
        if splits.gallery is None
        else "a part of its own",
        "similarity": "inner product of the concatenated unit-length embeddings",
        "ties": "count against the model",
    }


def scalars(evaluation: dict) -> dict[str, float]:
    """An evaluation as flat metrics: `eval/recall@1`, `eval/learner_0/recall@1`, ..."""
    parts = {"eval": evaluation, "eval/mean_learner": evaluation["mean_learner"]}
    for number, learner in enumerate(evaluation["learners"]):
        parts[f"eval/learner_{number}"] = learner
    metrics = {}
    for name, part in parts.items():
        for k, value in part["recall"].items():
            metrics[f"{name}/recall@{k}"] = value
        metrics[f"{name}/map_at_r"] = part["map_at_r"]
    return metrics


def table(columns: dict[str, dict[str, float]], num_learners: int) -> str:
    """A table of Recall@K and MAP@R, a row for each learner and the ensemble.

    Args:
      columns: title to flat metrics as of `scalars`, e.g. {"untrained": ..., ...}.
      num_learners: M.

    Returns:
      lines of plain text.
    """
    rows = {f"learner {m}": f"eval/learner_{m}/" for m in range(num_learners)}
    rows |= {"mean learner": "eval/mean_learner/", "ensemble": "eval/"}
    names = [
        name.removeprefix("eval/")
        for name in next(iter(columns.values()))
        if name.count("/") == 1 and ("recall@" in name or "map_at_r" in name)
    ]
    shown = {n: n.replace("recall@", "R@").replace("map_at_r", "MAP@R") for n in names}
    lines = [
        " " * 12 + "".join(f"{title:>{8 * len(names)}}" for title in columns),
        " " * 12 + "".join(f"{shown[n]:>8}" for _ in columns for n in names),
    ]
    for row, prefix in rows.items():
        cells = (metrics[prefix + n] for metrics in columns.values() for n in names)
        lines.append(f"{row:<12}" + "".join(f"{cell:>8.3f}" for cell in cells))
    return "\n".join(lines)
