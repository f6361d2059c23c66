"""Embeds the part of the data that is held out, and has it measured."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

import abe_jax
from abe_jax import (
    data,
    models,
    parallel,
    processes,
    train_step,
)
from abe_jax.evaluate.diversity import mask_correlation
from abe_jax.evaluate.measure import measure
from abe_jax.workdir import claim, locate, weights

_log = logging.getLogger(__name__)

_IMAGES_FOR_MASKS = 8


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A measured state, with what its report shows.

    Attributes:
      content: that of `evaluation.json`.
      queries: the images that were evaluated.
      embeddings: theirs, float32 `[n, M, D/M]`.
      gallery: what was searched, and its embeddings; None where the queries were.
      masks: a few of the queries, and the learners' masks of them, float32
        `[k, M, h, w, C]`; None where the model has none, or one learner.
    """

    content: dict
    queries: data.Subset
    embeddings: np.ndarray
    gallery: tuple[data.Subset, np.ndarray] | None
    masks: tuple[data.Subset, np.ndarray] | None = None


class Evaluator:
    """Embeds the classes held out and measures retrieval among them."""

    def __init__(self, config, model: models.Embedder, splits: data.Splits, mesh: Mesh):
        """Compiles nothing yet; the first run does.

        Args:
          config: whole config.
          model: gives structure and preprocessing.
          splits: as returned by `data.create`; its `evaluation` part is measured.
          mesh: the devices.
        """
        self._config = config
        self._num_learners = model.num_learners
        self._splits = splits
        self._mesh = mesh
        self._embed = self._mapped(train_step.make_embed_step, model)
        self._attention = (
            self._mapped(train_step.make_attention_step, model)
            if isinstance(model, models.ABE) and model.num_learners > 1
            else None
        )

    def _mapped(self, make: Callable, model: models.Embedder) -> Callable:
        return parallel.map_over_devices(
            make(model, self._config.data.image_size),
            self._mesh,
            mapping=self._config.parallel.mapping,
            rows_out=True,
        )

    def run(
        self, state: train_step.TrainState, check: Callable[[], None] = lambda: None
    ) -> Evaluation:
        """Measures a state. All processes get the same.

        Args:
          state: replicated over the mesh.
          check: called before every batch; may raise to stop.

        Raises:
          UserError: see `measure`.
        """
        queries, gallery = self._splits.evaluation, self._splits.gallery
        embeddings = self.embed(state, queries, check)
        searched, labelled = None, None
        if gallery is not None:
            searched = (gallery, self.embed(state, gallery, check))
            labelled = (searched[1], gallery.labels)
        measured = measure(
            embeddings, queries.labels, self._config.eval.recall_at, labelled
        )
        masks = None
        if self._attention is not None:
            masks = self._masks(state, queries, check)
            measured["diversity"]["mask_correlation"] = mask_correlation(masks[1])
        content = {
            "step": int(state.step),
            **measured,
            "protocol": _protocol(self._config, self._splits, self._num_learners),
        }
        return Evaluation(content, queries, embeddings, searched, masks)

    def _masks(
        self,
        state: train_step.TrainState,
        subset: data.Subset,
        check: Callable[[], None],
    ) -> tuple[data.Subset, np.ndarray]:
        """A few images, spread evenly over a part, and masks `[n, M, h, w, C]`."""
        assert self._attention is not None
        few = subset.spread(min(len(subset), _IMAGES_FOR_MASKS))
        batch_size = -(-_IMAGES_FOR_MASKS // self._mesh.size) * self._mesh.size
        reading = data.Reading.of_process(self._config.data, *processes.place())
        # Workers would start for this one batch.
        reading = dataclasses.replace(reading, num_workers=0)
        (batch,) = data.evaluation_batches(few, batch_size, reading)
        check()
        images = parallel.split_rows(batch["image"], self._mesh)
        masks = self._attention((state.params, state.model_state), images)
        return few, processes.gather_rows(masks[: len(few)])

    def embed(
        self,
        state: train_step.TrainState,
        subset: data.Subset,
        check: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """Embeds every image of a part once: float32 `[n, M, D/M]`, in its order.

        Every process gets all of them.
        """
        # A fixed size per device: programs of one shape round an image alike.
        batch_size = self._config.eval.batch_size * self._mesh.size
        reading = data.Reading.of_process(self._config.data, *processes.place())
        parts: list[np.ndarray] = []
        pending: jax.Array | None = None
        batches = data.evaluation_batches(subset, batch_size, reading)
        with contextlib.closing(batches):
            for batch in batches:
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


def measure_checkpoint(config, workdir: str, step: int | None = None) -> Evaluation:
    """Restores a run's checkpoint and measures it.

    Args:
      config: of the run.
      workdir: folder of the run.
      step: which checkpoint; the newest by default.

    Raises:
      UserError: no such run or checkpoint, or one of another config; the data at the
        run's own path has changed; or processes differ in config or data.
    """
    folder = locate(workdir)
    claim.require_run(folder, config, may_differ=("data.name",))
    config = claim.with_own_weights(folder, config)
    splits = data.create(config.data)
    description = splits.description()
    claim.require_one_for_all(config, description)
    other_data = claim.other_data(folder, config, description)
    mesh = parallel.make_mesh()
    model, state = weights.restore_trained(folder, config, mesh, step)
    evaluation = Evaluator(config, model, splits, mesh).run(state)
    content = evaluation.content
    if other_data is not None:
        seen = splits.seen(other_data.trained)
        content["protocol"] |= {"zero_shot": not seen, "other_data": other_data.path}
        _log.warning(
            "this is not the data that was trained on (%s); %d of its classes have the "
            "names of training classes.",
            other_data.difference,
            len(seen),
        )
    return evaluation


def _protocol(config, splits: data.Splits, num_learners: int) -> dict:
    """What a number must be reported with."""
    return {
        "version": abe_jax.__version__,
        "data": config.data.name,
        "split": splits.evaluation_name,
        "zero_shot": splits.zero_shot,
        "num_classes": len(np.unique(splits.evaluation.labels)),
        "num_skipped": splits.num_skipped,
        "storage": splits.evaluation.source.storage,
        "model": config.model.name,
        "trunk": config.model.trunk,
        "pretrained": config.model.pretrained,
        "branch": config.model.get("branch"),
        "dtype": config.model.dtype,
        "freeze_batch_norm": config.model.freeze_batch_norm,
        "width": config.model.width,
        "num_learners": num_learners,
        "embedding_dim": config.model.embedding_dim,
        "load_size": config.data.load_size,
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
