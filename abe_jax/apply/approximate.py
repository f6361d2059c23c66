"""Search of millions of images through a graph of neighbours, by usearch (HNSW).

It looks at a small part of the gallery and may miss what is near; what it finds is
scored exactly. `recall` says how much it misses.
"""

import contextlib
import glob
import hashlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from abe_jax import data, retrieval
from abe_jax.data.datasets.tree import printable
from abe_jax.errors import UserError, first_line
from abe_jax.workdir import whole

_DELETE = "delete it, and it is made anew"
_MEASURED = 200  # rows that ask, to measure the recall
_NEIGHBOURS = 10


def require_usearch() -> Callable[..., Any]:
    """What makes an index of usearch.

    Raises:
      UserError: usearch is not installed.
    """
    try:
        from usearch.index import Index
    except ImportError as error:
        raise UserError(
            "approximate search needs usearch: pip install -e '.[approximate]'"
        ) from error
    return Index


class Graph:
    """A gallery that is searched approximately, with the answers of `Gallery`.

    Attributes:
      recall: share of a row's 10 exactly nearest other rows that it finds, in [0, 1];
        None where the graph was read from its file.
    """

    def __init__(self, rows: np.ndarray, stem: pathlib.Path):
        """Builds the graph, or reads it where there is a file of it for these rows.

        Args:
          rows: float32 `[N, D]`, all of one length.
          stem: path of the file, without the digest of its rows and the suffix.

        Raises:
          UserError: usearch is not installed, or the file is damaged or cannot be
            written.
        """
        make = require_usearch()
        digest = hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()[:16]
        path = stem.with_name(f"{stem.name}-{digest}.usearch")
        self._rows, self._path = rows, path
        self._graph: Any = make(ndim=rows.shape[1], metric="ip", dtype="f32")
        self.recall: float | None = None
        if path.exists():
            with _named("read", path, _DELETE):
                self._graph.load(str(path))
            return
        with _named("write", path, "make room there"):  # before long work
            tempfile.TemporaryFile(dir=path.parent).close()
        self._graph.add(np.arange(len(rows)), rows)
        self.recall = self._measure(rows)
        with _named("write", path, "make room there"), whole(path) as part:
            self._graph.save(str(part))
            digests = "[0-9a-f]" * len(digest)
            for old in stem.parent.glob(f"{glob.escape(stem.name)}-{digests}.usearch"):
                old.unlink()

    def top_k(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `retrieval.Gallery.top_k`; where fewer are found, row -1 at the end.

        Raises:
          UserError: the file that the graph was read from is damaged.
        """
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1)
        found = self._graph.search(queries, k)
        # usearch answers a single query with its matches alone.
        for query, matches in enumerate([found] if len(queries) == 1 else found):
            keys = matches.keys.astype(np.int64)
            if not np.all((0 <= keys) & (keys < len(self._rows))):
                raise UserError(
                    f"the graph {printable(self._path)} is damaged; {_DELETE}."
                )
            exact = self._rows[keys] @ queries[query]
            order = np.argsort(-exact, stable=True)
            rows[query, : len(keys)] = keys[order]
            scores[query, : len(keys)] = exact[order]
        return scores, rows

    def _measure(self, rows: np.ndarray) -> float:
        asked = data.evenly(len(rows), _MEASURED)
        k = min(_NEIGHBOURS, len(rows) - 1)
        if not k:
            return 1.0
        exact, _ = retrieval.top_k(rows[asked], rows, k, own_rows=asked)
        scores, found = self.top_k(rows[asked], k + 1)
        scores[found == asked[:, None]] = -np.inf
        best = -np.sort(-scores, axis=1)[:, :k]
        # Of equal images any will do; usearch rounds in its own way.
        return float((best >= exact[:, -1:] - 1e-5).mean())


@contextlib.contextmanager
def _named(verb: str, path: pathlib.Path, advice: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot {verb} the graph {printable(path)} ({first_line(error)}); "
            f"{advice}."
        ) from error
