"""Makes a data set ready for training: checked, complete, small and fast to read.

python -m abe_jax.prepare --dataset=cub200 --source=CUB_200_2011 --data_dir=data
"""

import contextlib
import errno
import io
import logging
import os
import pathlib
import sys
import time
from collections.abc import Sequence

import tqdm
from absl import app, flags

from abe_jax import command_line
from abe_jax.data import prepared
from abe_jax.data.datasets import DATASETS
from abe_jax.data.datasets.definition import DataSet
from abe_jax.data.datasets.listing import Expected
from abe_jax.data.datasets.tree import local, printable
from abe_jax.data.prepare import layouts, origin, output
from abe_jax.data.prepare.encoding import Storing
from abe_jax.errors import UserError, require_known


def _known() -> list[str]:
    return [name for name, dataset in DATASETS.items() if dataset.read]


def prepare(
    dataset: str,
    source: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    *,
    storing: Storing | None = None,
    skip_bad: bool = False,
    num_processes: int = 1,
    expected: Expected | None = None,
) -> str:
    """Checks a data set and writes it as a TFDS data set of ArrayRecords.

    It is written beside its folder and moved there once it is whole, so that one that
    was interrupted leaves nothing that is taken for a data set; the next run deletes
    the rest and starts again. One that is there already is left as it is.

    Args:
      dataset: name of one that has something to prepare, such as "cub200".
      source: folder or archive with the data set, in any known layout.
      data_dir: folder of all prepared data sets; made if missing.
      storing: how images are stored; the short side at 256, quality 95 by default.
      skip_bad: whether files that are no usable images are left out; their names are
        then in `bad_files.txt` beside the records.
      num_processes: processes that encode images.
      expected: numbers to hold the data to; the official ones by default.

    Returns:
      a summary: lines of plain text.

    Raises:
      UserError: something in the arguments or the data that the user can mend.
    """
    storing = storing or Storing()
    require_known("--dataset", dataset, _known())
    if storing.size < 16 or not 1 <= storing.quality <= 100:
        raise UserError(
            f"--size is {storing.size} and --quality {storing.quality}; a size of at "
            "least 16 and a quality of 1 to 100 are needed."
        )
    source, data_dir = local(source, "--source"), local(data_dir, "--data_dir")
    try:
        str(data_dir).encode()
    except UnicodeEncodeError as error:  # ArrayRecord knows no other paths
        raise UserError(
            f"--data_dir {printable(data_dir)!r} is no UTF-8; choose another."
        ) from error
    if not os.path.exists(source):
        raise UserError(
            f"--source {str(source)!r} does not exist; give the folder or the archive "
            "with the data set."
        )
    folder = data_dir / dataset
    output.refuse_nested(source, folder)
    try:
        with output.only_one(folder):
            if done := prepared.find(data_dir, dataset):
                origin.refuse_other(done, source, storing)
                return f"already prepared; nothing to do\n{_summary(done)}"
            return _write(
                DATASETS[dataset],
                source,
                folder,
                storing,
                skip_bad,
                num_processes,
                expected,
            )
    except OSError as error:
        raise UserError(output.disk_text(error, folder)) from error
    except RuntimeError as error:  # what the writer of ArrayRecords raises
        if "No space left" not in str(error) and "quota exceeded" not in str(error):
            raise
        full = OSError(errno.ENOSPC, str(error))
        raise UserError(output.disk_text(full, folder)) from error


def _write(
    dataset: DataSet,
    source: pathlib.Path,
    folder: pathlib.Path,
    storing: Storing,
    skip_bad: bool,
    num_processes: int,
    expected: Expected | None,
) -> str:
    from abe_jax.data.prepare import builders  # not above: --help needs no TFDS

    start = time.perf_counter()
    final = folder / prepared.VERSION
    output.refuse_existing(final)
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(output.unfinished(folder))
        scratch = work / "unpacked"
        seen = origin.look(source)
        listing = layouts.read(dataset, source, scratch, expected)
        bar = stack.enter_context(
            tqdm.tqdm(total=len(listing.records), unit=" images", desc=dataset.name)
        )
        builder = builders.RetrievalBuilder(
            dataset,
            listing=listing,
            storing=storing,
            data_dir=str(work),
            skip_bad=skip_bad,
            num_processes=num_processes,
            progress=bar.update,
        )
        # TFDS makes this folder, though nothing is downloaded, and prints.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        builder.download_and_prepare(download_dir=str(work / "downloads"))
        made = prepared.find(work, dataset.name)
        assert made is not None
        bad = [(printable(name), reason) for name, reason in builder.bad]
        if bad:
            text = "".join(f"{name}\t{reason}\n" for name, reason in bad)
            (made / "bad_files.txt").write_text(text)
        origin.write(made, seen, storing, builder.digests)
        output.move(made, final)
    lines = [f"layout: {listing.layout}", _summary(final)]
    lines += [f"left out: {name} ({reason})" for name, reason in bad]
    if builder.copies:
        lines.append(
            f"{builder.copies:,} images outside of the training part are copies of "
            "training images; they were kept."
        )
    if unusable := builder.unusable_boxes:
        lines.append(
            f"{len(unusable):,} bounding boxes cannot be used, the first is that of "
            f"{printable(unusable[0])}; the images were kept, data.box_crop is refused."
        )
    return "\n".join([*lines, f"{time.perf_counter() - start:.0f} s"])


def _summary(folder: pathlib.Path) -> str:
    """A table of classes, images and bytes by role."""
    records = prepared.PreparedRecords(folder, 1)
    rows = [f"{folder}", f"{'part':<10}{'classes':>10}{'images':>10}{'MiB':>10}"]
    for role in prepared.ROLES:
        labels = records.labels[records.roles == role]
        if len(labels):
            files = folder.glob(f"*-{role}.array_record*")
            size = sum(file.stat().st_size for file in files) / 2**20
            classes = len(set(labels.tolist()))
            rows.append(f"{role:<10}{classes:>10,}{len(labels):>10,}{size:>10,.1f}")
    if records.num_skipped:
        rows.append(f"{records.num_skipped} bad files were left out: bad_files.txt")
    return "\n".join(rows)


def _define_flags() -> tuple[str, ...]:
    """Defines the flags, and returns their names; not when this is imported."""
    defined = (
        flags.DEFINE_string("dataset", None, f"One of {', '.join(_known())}."),
        flags.DEFINE_string(
            "source",
            None,
            "Folder, zip, tgz or tar file with the data set, in any known layout.",
        ),
        flags.DEFINE_string(
            "data_dir", None, "Folder to write to: DIR/cub200/1.0.0/..."
        ),
        flags.DEFINE_integer(
            "size", 256, "Short side of the stored images, pixels; none is enlarged."
        ),
        flags.DEFINE_integer("quality", 95, "Of the stored JPEG files, 1 to 100."),
        flags.DEFINE_bool(
            "keep_original",
            False,
            "Store images at their size, upright RGB JPEG files unchanged.",
        ),
        flags.DEFINE_bool(
            "skip_bad",
            False,
            "Leave out files that are no usable images, and list them.",
        ),
        flags.DEFINE_integer(
            "num_processes",
            len(os.sched_getaffinity(0)),
            "Processes; all cores by default.",
        ),
    )
    return tuple(flag.name for flag in defined)


def _main(argv: Sequence[str]) -> None:
    command_line.refuse_arguments(argv)
    given = flags.FLAGS
    for name in ("dataset", "source", "data_dir"):
        if not given[name].value:
            raise UserError(f"--{name} is required; see --help.")
    # TFDS logs much that is not for the user of this program.
    logging.getLogger("absl").setLevel(logging.WARNING)
    text = prepare(
        given.dataset,
        given.source,
        given.data_dir,
        storing=Storing(given.size, given.keep_original, given.quality),
        skip_bad=given.skip_bad,
        num_processes=given.num_processes,
    )
    print(text)


def _guarded_main(argv: Sequence[str]) -> None:
    try:
        _main(argv)
    except UserError as error:
        command_line.print_line(error)
        sys.exit(1)
    except KeyboardInterrupt:
        command_line.print_line(
            "interrupted; nothing was kept. Run the same command again."
        )
        sys.exit(130)


def _help(names: Sequence[str]) -> str:
    lines = [__doc__ or "", "Flags:"]
    lines += [f"  --{name:<15}{flags.FLAGS[name].help}" for name in names]
    lines += ["", "docs/benchmarks.md has the layouts that are known."]
    return "\n".join(lines)


def run() -> None:
    """Entry point of `abe-jax-prepare` and of `python -m abe_jax.prepare`."""
    names = _define_flags()
    app.run(
        _guarded_main,
        flags_parser=lambda argv: command_line.parse_flags(argv, lambda: _help(names)),
    )
