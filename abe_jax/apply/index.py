"""The embeddings of a folder, kept in one file and refreshed when the folder changes.

An index is an .npz file that NumPy reads:

    paths       text [F]              of every image below the folder, sorted
    versions    int64 [F, 2]          change with the image: size and time, or checksum
    readable    bool [F]
    embeddings  float32 [N, M, D/M]   of the N readable ones, in their order
    folder      text                  what was indexed
    model       text                  which weights, and how an image is prepared
"""

import dataclasses
import hashlib
import os
import pathlib
import tempfile
import zipfile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from abe_jax import retrieval
from abe_jax.apply import progress
from abe_jax.apply.approximate import Graph
from abe_jax.apply.images import ImageFile, Path, find
from abe_jax.data.datasets.tree import local, printable
from abe_jax.errors import UserError
from abe_jax.workdir import whole

if TYPE_CHECKING:
    from abe_jax.apply.trained import Trained

INDEX_FOLDER = "index"
_TRY_AGAIN = -1, -1  # the version of no file


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a refresh found.

    Attributes:
      embedded: number of images that were new or had changed, and are in now.
      kept: number of those that were in, and are as before.
      dropped: number of files that are gone, of those looked at before.
      unreadable: names of the images that cannot be read, now as before.
    """

    embedded: int
    kept: int
    dropped: int
    unreadable: tuple[str, ...]


class Match(NamedTuple):
    """An image that was found.

    Attributes:
      path: its name below the folder that was searched; see `apply.images`.
      score: cosine with the query in [-1, 1]; of all learners, their mean.
    """

    path: str
    score: float


class Index:
    """A gallery of images, ready to be searched.

    Attributes:
      folder: what was indexed.
      files: its images that could be read, sorted by name.
      embeddings: float32 `[N, M, D/M]`, of unit length for each learner.
      changes: what the last refresh found.
      identity: of the model that embedded them; see `Trained.identity`.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        files: list[ImageFile],
        embeddings: np.ndarray,
        changes: Changes,
        identity: str,
        file: pathlib.Path,
    ):
        self.folder = folder
        self.files = files
        self.embeddings = embeddings
        self.changes = changes
        self.identity = identity
        self._file = file
        # By learner, once each is asked; galleries lie on the devices.
        self._galleries: dict[int | None, retrieval.Gallery] = {}
        self._graphs: dict[int | None, Graph] = {}

    @property
    def paths(self) -> list[str]:
        """Name of each image below the folder; see `apply.images`."""
        return [file.name for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def matches(
        self,
        queries: np.ndarray,
        k: int,
        learner: int | None = None,
        *,
        approximate: bool = False,
    ) -> list[list[Match]]:
        """The nearest images of each query.

        Args:
          queries: `[Q, M, D/M]`, as returned by `Trained.embed`.
          k: how many; all where the index holds fewer.
          learner: the one that compares; None for all together.
          approximate: through `graph`, which may find fewer, instead of exactly.

        Returns:
          for each query its matches, the best first.
        """
        k = min(k, len(self))
        chosen = slice(None) if learner is None else slice(learner, learner + 1)
        asked = queries[:, chosen]
        gallery = (self.graph if approximate else self._gallery)(learner)
        sums, rows = gallery.top_k(asked.reshape(len(asked), -1), k)
        scores = sums / asked.shape[1]
        paths = self.paths
        # The graph gives row -1 where it found no more.
        return [
            [Match(paths[row], x) for row, x in zip(*found, strict=True) if row >= 0]
            for found in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def graph(self, learner: int | None = None) -> Graph:
        """What searches approximately; its file lies beside that of the index.

        Args:
          learner: the one that compares; None for all together.

        Raises:
          UserError: usearch is not installed, or the file is damaged or cannot be
            written.
        """
        if learner not in self._graphs:
            whose = "all" if learner is None else f"learner{learner}"
            stem = self._file.with_name(f"{self._file.stem}-{whose}")
            self._graphs[learner] = Graph(self._rows(learner), stem)
        return self._graphs[learner]

    def _rows(self, learner: int | None) -> np.ndarray:
        rows = self.embeddings if learner is None else self.embeddings[:, learner]
        return rows.reshape(len(rows), -1)

    def _gallery(self, learner: int | None) -> retrieval.Gallery:
        if learner not in self._galleries:
            self._galleries[learner] = retrieval.Gallery(self._rows(learner))
        return self._galleries[learner]


def refresh(model: "Trained", folder: Path, file: Path | None = None) -> Index:
    """Embeds what is new in a folder or has changed, forgets what is gone.

    Args:
      model: as returned by `abe_jax.load`.
      folder: folder, zip file or image.
      file: of the index; by default one in the workdir, by the folder's path.

    Returns:
      the index, which is in the file as well.

    Raises:
      UserError: no images, or the file is no index or cannot be written.
    """
    place = pathlib.Path(os.path.abspath(local(folder, "images")))
    path = (
        _default_file(model.workdir, place)
        if file is None
        else local(file, "file").absolute()
    )
    files = {image.name: image for image in find(folder)}
    known, stored = _read(path, model.identity)
    # Name to row of `parts`, put together; None where the image cannot be read.
    rows = {
        name: row
        for name, (version, row) in known.items()
        if name in files and files[name].version == version
    }
    kept = sum(row is not None for row in rows.values())
    fresh = rows.keys() == known.keys() == files.keys()
    parts = [stored] if len(stored) else []

    def refuse(file: ImageFile, error: UserError) -> None:
        if getattr(error.__cause__, "errno", None) is not None:
            # The system's refusal may pass: such an image is tried again.
            files[file.name] = dataclasses.replace(file, version=_TRY_AGAIN)
        rows[file.name] = None

    number = len(stored)
    todo = [image for name, image in files.items() if name not in rows]
    if not fresh:
        _require_writable(path)
    try:
        for done, embeddings in model.embed_files(progress.bar(todo), refuse):
            parts.append(embeddings)  # first: Ctrl-C may come between these lines
            rows |= {image.name: number + i for i, image in enumerate(done)}
            number += len(done)
    finally:
        # After Ctrl-C too: what was embedded need not be embedded again.
        names = sorted(rows)
        readable = [name for name in names if rows[name] is not None]
        together = np.concatenate(parts) if parts else stored
        if not fresh:
            together = together[np.array([rows[name] for name in readable], np.int64)]
            _write(
                path,
                paths=np.array(names, np.str_),
                versions=np.array([files[n].version for n in names], np.int64),
                readable=np.array([rows[n] is not None for n in names], bool),
                embeddings=together,
                folder=np.array(str(place)),
                model=np.array(model.identity),
            )
    if not readable:
        raise UserError(f"no image of {printable(folder)!r} could be read.")
    changes = Changes(
        embedded=len(readable) - kept,
        kept=kept,
        dropped=len(known.keys() - files.keys()),
        unreadable=tuple(name for name in names if rows[name] is None),
    )
    found = [files[name] for name in readable]
    return Index(place, found, together, changes, model.identity, path)


def _default_file(workdir: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in folder.name)
    return workdir / INDEX_FOLDER / f"{name or 'root'}-{digest}.npz"


Known = dict[str, tuple[tuple[int, int], int | None]]


def _read(path: pathlib.Path, identity: str) -> tuple[Known, np.ndarray]:
    """Name to version and row, and the rows; nothing of another model."""
    nothing = {}, np.zeros((0, 1, 1), np.float32)
    if not path.exists():
        return nothing
    try:
        with np.load(path, allow_pickle=False) as content:
            if str(content["model"]) != identity:
                return nothing
            names, readable = content["paths"].tolist(), content["readable"]
            rows = (np.cumsum(readable) - 1).tolist()
            known = {
                name: ((size, time), row if good else None)
                for name, (size, time), row, good in zip(
                    names, content["versions"].tolist(), rows, readable, strict=True
                )
            }
            return known, content["embeddings"]
    except (
        *(EOFError, KeyError, OSError, TypeError, ValueError),
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"{printable(path)} is no index ({error}); delete it, and it is made anew."
        ) from error


def _require_writable(path: pathlib.Path) -> None:
    """Checks, before hours of work, that the index can be put there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write the index: {error}.") from error


def _write(path: pathlib.Path, **arrays: np.ndarray) -> None:
    try:
        with whole(path) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise UserError(f"cannot write the index: {error}.") from error
