"""Images that look alike: queries against the index of a folder."""

import pathlib
from collections.abc import Iterator

import numpy as np

from abe_jax import interrupts
from abe_jax.apply import progress
from abe_jax.apply.images import ImageFile, Reader, find
from abe_jax.apply.index import Index, Match
from abe_jax.apply.trained import Trained
from abe_jax.data import decoding
from abe_jax.data.datasets.tree import printable
from abe_jax.errors import UserError
from abe_jax.report import page
from abe_jax.workdir import claim, locate

SEARCH_FILE = "search.html"

_PICTURE_SIZE = 128


@interrupts.ended_by_others_too()
def search_images(
    config,
    workdir: str,
    *,
    images: str,
    query: str,
    top_k: int,
    learner: int | None,
    approximate: bool,
    step: int | None,
) -> None:
    """Indexes a folder, searches it, and shows what was found: `--mode=search`.

    Prints a table and writes `search.html` into the workdir.

    Args:
      config: of the run.
      workdir: folder of the run.
      images: folder or zip file that is searched.
      query: image, folder or zip file that asks.
      top_k: how many matches each query gets.
      learner: the one that compares; None for all together.
      approximate: search by usearch instead of exactly.
      step: of the checkpoint; the newest by default.

    Raises:
      UserError: the config is not that of the run, no images, no query that can be
        read, no such learner, no usearch; or, after the matches, the page cannot be
        written.
    """
    queries = find(query, "query")
    claim.require_run(workdir, config)
    model = Trained(workdir, step, config=config)
    model.check_search(top_k, learner, approximate)
    index = model.index(images)
    changes = index.changes
    progress.list_refused(
        changes.reasons.get(name) or f"{printable(name)}, as before"
        for name in changes.unreadable
    )
    refused: list[UserError] = []
    done = list(model.embed_files(queries, lambda _, error: refused.append(error)))
    if not done:
        raise refused[0]
    progress.list_refused(refused)
    queries = [file for files, _ in done for file in files]
    asked = np.concatenate([embeddings for _, embeddings in done])
    results = index.matches(asked, top_k, learner, approximate=approximate)
    path = locate(workdir) / SEARCH_FILE
    compared_by = "all learners" if learner is None else f"learner {learner}"
    title = f"What {printable(query)} finds"
    unwritten = None
    try:  # before it is printed, perhaps to a program that soon reads no more
        write_page(path, title, queries, index, results, compared_by)
    except UserError as error:
        unwritten = error
    print(
        f"{len(index):,} images of {printable(images)}: {changes.embedded:,} embedded, "
        f"{changes.kept:,} as before, {changes.dropped:,} gone"
    )
    if approximate and (recall := index.graph(learner).recall) is not None:
        print(f"usearch finds {recall:.1%} of the 10 exactly nearest images")
    for file, matches in zip(queries, results, strict=True):
        print(f"\n{printable(file.name)}")
        for rank, match in enumerate(matches, start=1):
            print(f"{rank:>4}  {match.score:>7.4f}  {printable(match.path)}")
    if unwritten is not None:
        raise unwritten
    print(f"\n{printable(path)}")


def write_page(
    path: pathlib.Path,
    title: str,
    queries: list[ImageFile],
    index: Index,
    results: list[list[Match]],
    compared_by: str,
) -> None:
    """Writes a page with each query and its matches.

    Args:
      path: of the page.
      title: of the page.
      queries: the images that asked.
      index: what was searched.
      results: the matches of each query.
      compared_by: whose embeddings were compared.
    """
    pictures = page.Pictures()
    files = dict(zip(index.paths, index.files, strict=True))

    def rows() -> Iterator[page.Query]:
        with Reader() as reader:

            def url(file) -> str:
                if pictures.full:
                    return ""
                try:
                    data = reader.read(file)
                    pixels = decoding.decode(data, _PICTURE_SIZE, file.name)
                except UserError:  # it is gone since it was embedded
                    return ""
                return pictures.url(pixels)

            for file, matches in zip(queries, results, strict=True):
                if pictures.full:
                    return
                name = printable(file.name)
                yield page.Query(
                    heading=name,
                    asked=page.Shot(url(file), f"query: {name}", "query", name),
                    found=[
                        page.Shot(
                            url(files[match.path]),
                            f"match {rank}, cosine {match.score:.3f}: "
                            f"{printable(match.path)}",
                            f"{match.score:.3f} {printable(match.path)}",
                            printable(match.path),
                        )
                        for rank, match in enumerate(matches, start=1)
                    ],
                )

    page.write(
        path,
        "search.html",
        title=title,
        folder=printable(index.folder),
        size=len(index),
        number=len(queries),
        compared_by=compared_by,
        queries=list(rows()),
    )
