"""A trained model, opened from the folder of its run."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import jax
import numpy as np
from PIL import Image

from abe_jax import parallel, train_step
from abe_jax.apply.approximate import require_usearch
from abe_jax.apply.images import ImageFile, Path, decoded, find
from abe_jax.apply.index import Index, Match, refresh
from abe_jax.data import decoding
from abe_jax.errors import UserError
from abe_jax.workdir import EVALUATION_FILE, config_files, fields, locate, weights

Array: TypeAlias = np.ndarray | jax.Array
Images: TypeAlias = Array | Path | Sequence[Array] | Sequence[Path]

_ACCEPTED = "images must be uint8 arrays [H, W, 3], RGB, or all of them paths"


class Trained:
    """A trained model: images to embeddings, masks and what they find.

    An image is treated as in evaluation: a square of `config.data.load_size` as
    `config.data.square` says, of which the model sees the middle. But it is taken
    whole: with `config.data.box_crop`, crop your images yourself.

    Attributes:
      workdir: folder of the run.
      config: of the run, as ConfigDict.
      step: of the checkpoint.
      num_learners: M.
      dim: D, the dimensions of all learners together.
      variables: parameters and other variables, on every device.
      embed_program: one device's, from `variables` and uint8 images
        `[B, load_size, load_size, 3]` to float32 `[B, M, D/M]`; for exports.
    """

    def __init__(self, workdir: Path, step: int | None = None, *, config: Any = None):
        """Restores a checkpoint; `abe_jax.load` has arguments and errors.

        Args:
          workdir: folder of the run.
          step: of the checkpoint; the newest by default.
          config: of the run; None for that in the workdir.
        """
        self.workdir = locate(workdir).absolute()
        stored = config_files.of_workdir(self.workdir) if config is None else config
        self.config: Any = stored.copy_and_resolve_references()
        fields.require_in_range(self.config)
        decoding.require_known_square(self.config.data.square)
        self._mesh = parallel.make_mesh(jax.local_devices())
        self.model, state = weights.restore_trained(
            self.workdir, self.config, self._mesh, step
        )
        self.step = int(state.step)
        self.variables = (state.params, state.model_state)
        self.num_learners: int = self.model.num_learners
        self.dim: int = self.config.model.embedding_dim
        size = self.config.data.image_size
        self.embed_program = train_step.make_embed_step(self.model, size)
        self._embed = self._mapped(self.embed_program)

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """Content of the run's `evaluation.json`; empty where there is none."""
        path = self.workdir / EVALUATION_FILE
        return config_files.read_object(path) if path.exists() else {}

    @cached_property
    def identity(self) -> str:
        """Changes with the weights, and with how an image becomes their input."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.variables):
            digest.update(np.asarray(leaf).tobytes())
        data, dtype = self.config.data, self.config.model.dtype
        prepared = f"{data.load_size} {data.square} {data.image_size} {dtype}"
        return f"{digest.hexdigest()[:32]} {prepared}"

    @property
    def protocol(self) -> dict[str, Any]:
        """What the run's figures must be reported with; empty before an evaluation."""
        return self.evaluation.get("protocol", {})

    def embed(self, images: Images) -> np.ndarray:
        """Embeds images.

        Args:
          images: uint8 RGB `[N, H, W, 3]` or `[H, W, 3]`, a sequence of such of any
            sizes, or the path of an image, a folder or a zip file, or a sequence of
            paths. Those in folders and zip files come sorted by name.

        Returns:
          float32 `[N, M, D/M]`, of unit length for each learner.

        Raises:
          UserError: a path holds no image, or one that cannot be read.
          ValueError: arrays of another shape or dtype.
        """
        parts = list(self._in_batches(self._pixels(images), self._embed))
        return np.concatenate(parts)

    def attention(self, images: Images) -> np.ndarray:
        """The learners' attention masks of images.

        Args:
          images: see `embed`.

        Returns:
          float32 `[N, M, h, w, C]` in (0, 1): for each learner its mask over the maps
          of the trunk's spatial part.

        Raises:
          UserError: the model has no attention; or see `embed`.
        """
        if not hasattr(self.model, "attention"):
            raise UserError(
                f"model.name is {self.config.model.name!r}, which has no attention; "
                "'abe' has."
            )
        return np.concatenate(
            list(self._in_batches(self._pixels(images), self._attention))
        )

    def index(self, folder: Path, file: Path | None = None) -> Index:
        """Embeds the images of a folder, to be searched; those it knows only once.

        Args:
          folder: folder of any depth, or zip file.
          file: that keeps the index; by default one in the workdir, for that folder
            and these weights.

        Returns:
          the index; its `changes` say what was embedded.

        Raises:
          UserError: no images, or the file is no index, that of another folder, or
            cannot be read or written.
        """
        return refresh(self, folder, file)

    def search(
        self,
        queries: Images,
        gallery: Index | Path,
        *,
        top_k: int = 10,
        learner: int | None = None,
        approximate: bool = False,
    ) -> list[list[Match]]:
        """Finds the images that are most like each query.

        A query that lies in the gallery finds itself, or an identical copy.

        Args:
          queries: see `embed`.
          gallery: as returned by `index`, which keeps it on the device for further
            searches; or the folder.
          top_k: how many; all where the gallery holds fewer.
          learner: the one that compares, from 0; None for all together.
          approximate: by usearch, for millions of images, which may find fewer;
            exactly by default.

        Returns:
          for each query its matches, the best first.

        Raises:
          UserError: see `embed`, `index` and `check_search`; or the index was made
            by other weights.
        """
        self.check_search(top_k, learner, approximate)
        index = (
            self.index(gallery) if isinstance(gallery, str | os.PathLike) else gallery
        )
        if index.identity != self.identity:
            raise UserError(
                f"the index of {index.folder} was made by other weights than those of "
                f"{self.workdir}, step {self.step}: make it with the same model."
            )
        return index.matches(
            self.embed(queries), top_k, learner, approximate=approximate
        )

    def check_search(
        self, top_k: int, learner: int | None, approximate: bool = False
    ) -> None:
        """Checks what is asked of `search`.

        Raises:
          UserError: no such learner, a number of matches below 1, or usearch, which
            searches approximately, is not installed.
        """
        if learner is not None and not 0 <= learner < self.num_learners:
            raise UserError(
                f"learner is {learner}; the model has learners 0 to "
                f"{self.num_learners - 1}."
            )
        if top_k < 1:
            raise UserError(f"top_k is {top_k}; it must be at least 1.")
        if approximate:
            require_usearch()

    def decode(self, content: bytes, name: str) -> np.ndarray:
        """An image file as the model takes it: uint8 `[size, size, 3]`.

        Args:
          content: of the file.
          name: what an error message calls it.

        Raises:
          UserError: it cannot be read as an image.
        """
        size, square = self.config.data.load_size, self.config.data.square
        return decoding.decode(content, size, name, square=square)

    def embed_files(
        self,
        files: Iterable[ImageFile],
        refused: Callable[[ImageFile, UserError], None],
    ) -> Iterator[tuple[list[ImageFile], np.ndarray]]:
        """Embeds image files in bounded memory.

        Args:
          files: as returned by `images.find`.
          refused: told of each file that cannot be read; may raise to stop.

        Yields:
          files in their order, and their embeddings, float32 `[n, M, D/M]`.
        """
        good: list[ImageFile] = []

        def pixels() -> Iterator[np.ndarray]:
            for file, result in decoded(files, self.decode):
                if isinstance(result, UserError):
                    refused(file, result)
                else:
                    good.append(file)
                    yield result

        for rows in self._in_batches(pixels(), self._embed):
            done, good[:] = good[: len(rows)], good[len(rows) :]
            yield done, rows

    @cached_property
    def _attention(self) -> Callable[[Any, Any], Any]:
        size = self.config.data.image_size
        return self._mapped(train_step.make_attention_step(self.model, size))

    def _mapped(self, program: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return parallel.map_over_devices(program, self._mesh, rows_out=True)

    def _in_batches(
        self, pixels: Iterable[np.ndarray], program: Callable[[Any, Any], Any]
    ) -> Iterator[np.ndarray]:
        """Runs a program on images, a batch ahead of whoever asks for its rows."""
        largest = self.config.eval.batch_size * self._mesh.size
        pending: tuple[jax.Array, int] | None = None
        batch: list[np.ndarray] = []

        def started() -> tuple[jax.Array, int]:
            padded = np.zeros((self._padded(len(batch)), *batch[0].shape), np.uint8)
            padded[: len(batch)] = batch
            rows = parallel.split_rows(padded, self._mesh)
            return program(self.variables, rows), len(batch)

        for image in pixels:
            batch.append(image)
            if len(batch) == largest:
                following = started()
                batch.clear()
                if pending is not None:
                    yield np.asarray(pending[0])[: pending[1]]
                pending = following
        following = started() if batch else None
        for rows in (pending, following):
            if rows is not None:
                yield np.asarray(rows[0])[: rows[1]]

    def _padded(self, count: int) -> int:
        """One of few sizes, as each is compiled anew: 1, 8 or all images a device."""
        sizes = [n * self._mesh.size for n in (1, 8, self.config.eval.batch_size)]
        return min(size for size in sizes if size >= count)

    def _pixels(self, given: Images) -> Iterator[np.ndarray]:
        items: list[Any]
        if isinstance(given, str | os.PathLike):
            items = [given]
        elif isinstance(given, np.ndarray | jax.Array):
            rows = np.asarray(given)
            items = list(rows[None] if rows.ndim == 3 else rows)
        elif isinstance(given, Iterable):
            items = list(given)
        else:
            raise ValueError(f"{_ACCEPTED}, not {type(given).__name__}.")
        if not items:
            raise ValueError("there are no images to embed.")
        paths = [item for item in items if isinstance(item, str | os.PathLike)]
        if len(paths) == len(items):
            files = itertools.chain.from_iterable(map(find, paths))
            for _, result in decoded(files, self.decode):
                if isinstance(result, UserError):
                    raise result
                yield result
            return
        size, square = self.config.data.load_size, self.config.data.square
        for item in items:
            if not isinstance(item, np.ndarray | jax.Array):
                raise ValueError(f"{_ACCEPTED}, not {type(item).__name__}.")
            shaped = item.ndim == 3 and item.shape[2] == 3 and item.size
            if item.dtype != np.uint8 or not shaped:
                raise ValueError(f"{_ACCEPTED}, not {item.dtype} {list(item.shape)}.")
            image = Image.fromarray(np.asarray(item))
            yield decoding.to_square(image, size, square)
