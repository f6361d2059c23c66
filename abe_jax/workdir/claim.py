"""A workdir belongs to one run: one config, one set of data."""

import hashlib
import json
import logging
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from abe_jax import data, processes
from abe_jax.data import prepared
from abe_jax.data.datasets.tree import local
from abe_jax.errors import UserError
from abe_jax.workdir import (
    CHANGES_FILE,
    CONFIG_FILE,
    DATA_FILE,
    EVALUATION_FILE,
    LOCK_FILE,
    METRICS_FILE,
    REPORT_FILE,
    checkpoints,
    config_files,
    fields,
    locate,
    lock,
    write_whole,
)

_log = logging.getLogger(__name__)

_WRITTEN = (DATA_FILE, CHANGES_FILE, METRICS_FILE, EVALUATION_FILE, REPORT_FILE)
_DESCRIBES = {"fingerprint", "storage", "classes"}  # of `data.Splits.description`


def require_own(
    workdir: pathlib.Path, config, description: dict
) -> dict[str, tuple[Any, Any]]:
    """Checks that a workdir is empty, or holds the run of this config and data.

    Args:
      workdir: of the run.
      config: of the run.
      description: of its data, as returned by `data.Splits.description`.

    Returns:
      the fields that steer what comes after (`fields.STEERING_FIELDS`) and differ: what
      they were and what they are now.

    Raises:
      UserError: the workdir holds a run of another config or of other data; what
        differs is named.
    """
    if not (workdir / CONFIG_FILE).exists():
        return {}
    steered = _refuse_other_config(workdir, fields.as_json(config))
    require_same_data(workdir, description)
    return steered


def require_one_for_all(config, description: dict) -> None:
    """Checks that all processes were given one config and see the same data.

    Fields that may differ between them (`fields.PER_PROCESS_FIELDS`) do not count. To
    be called by all of them.

    Args:
      config: of this process.
      description: of the data that it sees.

    Raises:
      UserError: on every process; one that differs from process 0 is named.
    """
    flat = fields.flat(fields.as_json(config))
    shared = {k: v for k, v in flat.items() if k not in fields.PER_PROCESS_FIELDS}
    own = np.array([_digest(shared), _digest(description)], np.uint64)
    of_all = processes.gather(own)
    differences = np.argwhere((of_all != of_all[0]).T)  # of configs first
    if len(differences):
        what, number = differences[0]
        raise UserError(
            f"processes 0 and {number} were started with different configs; give all "
            "of them the same."
            if what == 0
            else f"processes 0 and {number} see different data; give each the same at "
            "its data.path."
        )


def claim(
    workdir: pathlib.Path,
    config,
    description: dict,
    *,
    steered: Mapping[str, tuple[Any, Any]],
    step: int,
) -> None:
    """Makes the workdir this config's and data's; for process 0.

    Args:
      workdir: of the run; exists.
      config: of the run.
      description: of its data.
      steered: as returned by `require_own`.
      step: where the run goes on.

    Raises:
      NotWritable: such as on a full disk.
    """
    _record(workdir, steered, step)
    write_whole(
        workdir / CONFIG_FILE, json.dumps(fields.as_json(config), indent=2) + "\n"
    )
    if not (workdir / DATA_FILE).exists():
        write_whole(workdir / DATA_FILE, json.dumps(description, indent=1) + "\n")


def with_own_weights(workdir: pathlib.Path, config) -> Any:
    """A config that names the weights which the run in the workdir began with.

    They are read at the first start only: what another start names has no effect.
    """
    if not (workdir / CONFIG_FILE).exists():
        return config
    own = config_files.stored(workdir)["model"].get("pretrained")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.pretrained = own
    return config


def require_run(
    workdir: str | pathlib.Path, config, may_differ: Collection[str] = ()
) -> None:
    """Checks that the workdir holds a run of this config.

    Args:
      workdir: of the run.
      config: of this start.
      may_differ: full names of fields that do not count, beside the free ones.

    Raises:
      UserError: there is no run, or it is one of another config, or a field of this
        one is out of range.
    """
    fields.require_in_range(config)
    _refuse_other_config(locate(workdir), fields.as_json(config), may_differ)


def require_same_data(workdir: pathlib.Path, description: dict) -> None:
    """Checks that data is that which the run in the workdir began with.

    Only its names count, and not where it lies. A run of an earlier version of this
    project does not know its data: nothing is checked.

    Raises:
      UserError: it differs; the first differences are named.
    """
    if not (workdir / DATA_FILE).exists():
        return
    found = data.differences(_read_description(workdir), description)
    if found:
        more = f"; and {len(found) - 3} more differences" if len(found) > 3 else ""
        raise UserError(
            f"the data is not what the run in {workdir} began with: "
            f"{'; '.join(found[:3])}{more}. Bring the data back as it was, or give "
            "another --workdir."
        )


class OtherData(NamedTuple):
    """Data that a finished model is evaluated on and was not trained with.

    Attributes:
      path: `data.path`, where it lies.
      trained: names of the classes that were trained on.
      difference: the first difference, for people.
    """

    path: str
    trained: list[str]
    difference: str


def other_data(workdir: pathlib.Path, config, description: dict) -> OtherData | None:
    """Whether a finished run is to be evaluated on other data than its own.

    With another `data.path` that is allowed, and said; at the run's own path data must
    be what it was.

    Args:
      workdir: of the run.
      config: of this start.
      description: of its data.

    Raises:
      UserError: the data at the run's own path has changed.
    """
    own: Any = config_files.of_workdir(workdir)
    if config.data.path == own.data.path or not (workdir / DATA_FILE).exists():
        require_same_data(workdir, description)
        return None
    stored = _read_description(workdir)
    found = data.differences(stored, description)
    trained = sorted(stored["classes"].get("train", {}))
    return OtherData(config.data.path, trained, found[0]) if found else None


def require_outside_data(workdir: pathlib.Path, section) -> None:
    """Checks that a run does not write among the images that it reads.

    Neither into its workdir, nor into `data.feature_cache`.

    Args:
      workdir: of the run.
      section: `data` of its config.

    Raises:
      UserError: one of these is the folder of the images, or lies in it.
    """
    if not section.path:
        return
    images = local(section.path, "data.path").resolve()
    if prepared.find(images, section.name):
        return
    folders = {f"--workdir={workdir}": workdir}
    if cache := section.get("feature_cache"):
        name = f"data.feature_cache = {cache!r}"
        folders[name] = local(cache, "data.feature_cache")
    for name, folder in folders.items():
        if images.is_dir() and folder.resolve().is_relative_to(images):
            raise UserError(
                f"{name} lies in data.path = {section.path!r}, where it would be read "
                "as a class; give a folder outside it."
            )


def refuse_foreign_files(workdir: pathlib.Path) -> None:
    """Checks that nothing would be written over that no run left there.

    Raises:
      UserError: the workdir holds no run, but a file by the name of one of a run's; or
        is a file itself.
    """
    if workdir.is_file():
        raise UserError(f"--workdir={workdir} is a file; give a folder.")
    found = [] if lock.is_free_or_ours(workdir) else [LOCK_FILE]
    holds_a_run = (workdir / CONFIG_FILE).exists() or checkpoints.steps_in(workdir)
    if not holds_a_run:
        found += [name for name in _WRITTEN if (workdir / name).exists()]
    if found:
        raise UserError(
            f"--workdir={workdir} holds {found[0]}, which abe_jax did not write; "
            "give an empty folder, or one that does not exist."
        )


def _digest(content: dict) -> int:
    text = json.dumps(content, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _read_description(workdir: pathlib.Path) -> dict:
    path = workdir / DATA_FILE
    content = config_files.read_object(path)
    if not _DESCRIBES <= content.keys():
        raise UserError(f"cannot read {path}: it holds no description of data.")
    return content


def _refuse_other_config(
    workdir: pathlib.Path, current: dict, may_differ: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The fields that steer the run and differ: what they were and what they are."""
    stored = fields.as_json(config_files.of_workdir(workdir))
    old, new = fields.flat(stored), fields.flat(current)
    # A field that only the run has is gone from this version of the project.
    changed = {
        name: (old[name], new[name])
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name] and name not in {*fields.FREE_FIELDS, *may_differ}
    }
    refused = [
        f"{name} (there {there!r}, now {now!r})"
        for name, (there, now) in changed.items()
        if name not in fields.STEERING_FIELDS
    ]
    if refused:
        raise UserError(
            f"{workdir} holds a run of another config: {', '.join(refused)}. Use "
            "another --workdir, or the run's own settings."
        )
    return changed


def _record(
    workdir: pathlib.Path, steered: Mapping[str, tuple[Any, Any]], step: int
) -> None:
    if not steered:
        return
    path = workdir / CHANGES_FILE
    lines = ""
    for name, (there, now) in steered.items():
        _log.info(
            "%s was %r until step %d and is %r from here on", name, there, step, now
        )
        change = {"step": step, "field": name, "before": there, "after": now}
        lines += json.dumps(change) + "\n"
    # Of a damaged file every byte is kept.
    kept = {"encoding": "utf-8", "errors": "surrogateescape"}
    before = path.read_text(**kept) if path.exists() else ""
    # A start that was killed before it wrote the config has recorded them already.
    if not before.endswith(lines):
        write_whole(path, before + lines)
