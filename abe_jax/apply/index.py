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
import logging
import os
import pathlib
import tempfile
import time
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from abe_jax import retrieval
from abe_jax.apply import npz, progress
from abe_jax.apply.approximate import Graph
from abe_jax.apply.images import ImageFile, Path, find
from abe_jax.data.datasets.tree import local, printable
from abe_jax.errors import UserError
from abe_jax.workdir import whole

if TYPE_CHECKING:
    from abe_jax.apply.trained import Trained

_log = logging.getLogger(__name__)

INDEX_FOLDER = "index"
_TRY_AGAIN = -1, -1  # the version of no file
_MOVED_AT_ONCE = 4096  # rows; a copy of all might not fit
# While images are embedded, the index is written after so many seconds, or so many
# times as long as the last write took, whichever is longer.
_WRITE_AFTER = 180.0, 20


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a refresh found.

    Attributes:
      embedded: number of images that were new or had changed, and are in now.
      kept: number of those that were in, and are as before.
      dropped: number of files that are gone, of those looked at before.
      unreadable: names of all images that cannot be read, newly or as before.
      reasons: why not, by name, of those that this refresh tried to read.
    """

    embedded: int
    kept: int
    dropped: int
    unreadable: tuple[str, ...]
    reasons: dict[str, str]


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
        files = self.files
        # The graph gives row -1 where it found no more.
        return [
            [
                Match(files[row].name, x)
                for row, x in zip(*found, strict=True)
                if row >= 0
            ]
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

    The file is written every few minutes as well, so that little is lost with the
    process.

    Args:
      model: as returned by `abe_jax.load`.
      folder: folder, zip file or image.
      file: of the index; by default one in the workdir, for that folder and those
        weights. An index of other weights is made anew, with a warning.

    Returns:
      the index, which is in the file as well.

    Raises:
      UserError: no images, or the file is no index, that of another folder, or cannot
        be read or written.
    """
    place = pathlib.Path(os.path.abspath(local(folder, "images")))
    if file is None:
        path = _default_file(model.workdir, place, model.identity)
        advice = "delete it, and it is made anew"
    else:  # perhaps something else of the user's
        path, advice = local(file, "file").absolute(), "give another file"
    files = {image.name: image for image in find(folder)}
    known, stored, of, made_by = _read(path, advice)
    # A folder that was moved, or is seen from another machine, has the same names.
    if known and of != str(place) and known.keys().isdisjoint(files):
        raise UserError(
            f"{printable(path)} is the index of {printable(of)}; give another file."
        )
    if known and made_by != model.identity:
        _log.warning("%s is of other weights; it is made anew.", printable(path))
        known = {}
    looked = {
        name: known[name]
        for name, image in files.items()
        if name in known and known[name][0] == image.version
    }
    kept = sum(readable for _, readable in looked.values())
    todo = [image for name, image in files.items() if name not in looked]
    # A row for each image that may be readable, in the order of their names.
    room = [name for name in files if name not in looked or looked[name][1]]
    rows = {name: row for row, name in enumerate(room)}
    embeddings = stored
    if todo or looked != known:
        _require_writable(path)
        each = model.num_learners, model.dim // model.num_learners
        embeddings = _moved(stored, known, rows, each)
    del stored

    reasons: dict[str, str] = {}

    def refuse(file: ImageFile, error: UserError) -> None:
        # An error of the system or a lack of memory may pass: the file is tried again.
        # So is one in a zip file: its version stays the same when that is mended.
        cause = error.__cause__
        refused = getattr(cause, "errno", None) is not None
        in_zip = file.member is not None
        passes = refused or in_zip or isinstance(cause, MemoryError)
        looked[file.name] = (_TRY_AGAIN if passes else file.version), False
        reasons[file.name] = str(error)

    def readable() -> list[str]:
        return [name for name in room if name in looked and looked[name][1]]

    def write() -> None:
        good = [rows[name] for name in readable()]
        _write(path, place, model.identity, looked, embeddings, good)

    due = time.monotonic() + _WRITE_AFTER[0]
    try:
        for done, found in model.embed_files(progress.bar(todo), refuse):
            embeddings[[rows[image.name] for image in done]] = found
            looked |= {image.name: (image.version, True) for image in done}
            if (begin := time.monotonic()) >= due:
                write()
                ended = time.monotonic()
                due = ended + max(_WRITE_AFTER[0], _WRITE_AFTER[1] * (ended - begin))
    finally:
        # After Ctrl-C too: what was embedded need not be embedded again.
        if looked != known:
            write()
    good = readable()
    if not good:
        why = next(iter(reasons.values()), "they are as before.")
        raise UserError(f"no image of {printable(folder)!r} could be read: {why}")
    changes = Changes(
        embedded=len(good) - kept,
        kept=kept,
        dropped=len(known.keys() - files.keys()),
        unreadable=tuple(name for name in files if not looked[name][1]),
        reasons=reasons,
    )
    if len(good) < len(room):  # each row moves up, past those that are not readable
        for to, block in _blocks(embeddings, [rows[name] for name in good]):
            embeddings[to : to + len(block)] = block
    found = [files[name] for name in good]
    held = embeddings[: len(good)]
    return Index(place, found, held, changes, model.identity, path)


def _default_file(
    workdir: pathlib.Path, folder: pathlib.Path, identity: str
) -> pathlib.Path:
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in folder.name)
    contents = os.fsencode(folder), identity.encode()
    digests = [hashlib.sha256(content).hexdigest()[:8] for content in contents]
    return workdir / INDEX_FOLDER / f"{'-'.join([name or 'root', *digests])}.npz"


# Name to version and whether it can be read.
Looked = dict[str, tuple[tuple[int, int], bool]]


def _moved(
    stored: np.ndarray, known: Looked, rows: dict[str, int], each: tuple[int, int]
) -> np.ndarray:
    """An array with room for all `rows`; known embeddings are at their new places."""
    embeddings = np.empty((len(rows), *each), np.float32)
    readable = (name for name, (_, readable) in known.items() if readable)
    moves = [(rows[name], row) for row, name in enumerate(readable) if name in rows]
    for at in range(0, len(moves), _MOVED_AT_ONCE):
        to, row = zip(*moves[at : at + _MOVED_AT_ONCE], strict=True)
        embeddings[list(to)] = stored[list(row)]
    return embeddings


def _blocks(
    embeddings: np.ndarray, rows: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Copies of some rows, a few at once, each with its place among them."""
    for at in range(0, len(rows), _MOVED_AT_ONCE):
        yield at, embeddings[rows[at : at + _MOVED_AT_ONCE]]


def _read(path: pathlib.Path, advice: str) -> tuple[Looked, np.ndarray, str, str]:
    """Images looked at, embeddings, folder, identity of the model; empty if no file."""
    if not path.exists():
        return {}, np.zeros((0, 1, 1), np.float32), "", ""
    try:
        with np.load(path, allow_pickle=False) as content:
            names, readable = content["paths"].tolist(), content["readable"].tolist()
            known = {
                name: ((size, time), good)
                for name, (size, time), good in zip(
                    names, content["versions"].tolist(), readable, strict=True
                )
            }
            embeddings = content["embeddings"]
            if len(embeddings) != sum(readable):
                raise ValueError(f"{len(embeddings)} rows of {sum(readable)} images")
            return known, embeddings, str(content["folder"]), str(content["model"])
    except OSError as error:
        raise UserError(
            f"cannot read the index {printable(path)}: {error.strerror or error}."
        ) from error
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{printable(path)} is no index ({error}); {advice}."
        ) from error


def _require_writable(path: pathlib.Path) -> None:
    """Checks, before hours of work, that the index can be put there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write the index: {error}.") from error


def _write(
    path: pathlib.Path,
    folder: pathlib.Path,
    identity: str,
    looked: Looked,
    embeddings: np.ndarray,
    good: list[int],
) -> None:
    """Writes the index; `good` are the rows of the readable, by their names."""
    names = sorted(looked)
    arrays = {
        "paths": np.array(names, np.str_),
        "versions": np.array([looked[name][0] for name in names], np.int64),
        "readable": np.array([looked[name][1] for name in names], bool),
        "folder": np.array(str(folder)),
        "model": np.array(identity),
    }
    shape = (len(good), *embeddings.shape[1:])
    blocks = (block.data for _, block in _blocks(embeddings, good))
    try:
        with whole(path) as part:
            npz.write(part, shape, blocks, arrays)
    except OSError as error:
        raise UserError(f"cannot write the index: {error}.") from error
