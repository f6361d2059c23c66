"""Where a config comes from: a file, one that the package brings, or a run's workdir.

This is a config file itself: `--config=abe_jax/workdir/config_files.py:WORKDIR` is the
config of the run in WORKDIR. Nothing here imports JAX: --help and mistakes are quick.
"""

import difflib
import importlib.util
import json
import os
import pathlib
import sys
import types
from typing import Any

from ml_collections import ConfigDict

from abe_jax.errors import UserError
from abe_jax.workdir import CONFIG_FILE, fields, locate

_SECTIONS = "model", "data", "train"  # of every config

_PACKAGE = pathlib.Path(__file__).parents[1]
# In a wheel inside the package, in a clone beside it.
_CONFIGS = next(
    folder
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    if (folder / "default.py").exists()
)


def make_importable() -> None:
    """Lets config files say `from configs import default`, wherever they are.

    `configs` is then the working folder's own of that name, where there is one, and
    after it the one that the package brings.
    """
    if "configs" not in sys.modules:
        package = types.ModuleType("configs")
        package.__path__ = [os.path.abspath("configs"), str(_CONFIGS)]
        sys.modules["configs"] = package


def find(name: str) -> str:
    """The file that `--config=name` means.

    Args:
      name: path of a file, or the bare name of one in `configs/`: "quickstart"; either
        with ":" and an argument of its `get_config`.

    Raises:
      UserError: there is no such file.
    """
    path, colon, argument = name.partition(":")
    if path and not path.endswith(".py") and os.sep not in path:
        for folder in (pathlib.Path("configs"), _CONFIGS):
            if (folder / f"{path}.py").is_file():
                return f"{folder / path}.py{colon}{argument}"
    elif os.path.isfile(local := os.path.expanduser(path)):
        return f"{local}{colon}{argument}"
    known = sorted(file.stem for file in _CONFIGS.glob("*.py"))
    near = difflib.get_close_matches(pathlib.Path(path).stem, known, n=1)
    hint = f"did you mean --config={near[0]}?" if near else "give the path of a file."
    raise UserError(
        f"--config: there is no file {path!r}; {hint} Known by name are "
        f"{', '.join(known)}."
    )


def holds_run(workdir: str | os.PathLike[str]) -> bool:
    """Whether a run began in the workdir.

    Raises:
      UserError: see `locate`.
    """
    return (locate(workdir) / CONFIG_FILE).exists()


def stored(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields that a run left in its workdir, as JSON has them.

    Raises:
      UserError: see `locate`; there is no run in the workdir, or its config cannot be
        read.
    """
    path = locate(workdir) / CONFIG_FILE
    if not path.exists():
        raise UserError(
            f"{workdir} holds no run (no {CONFIG_FILE}); train first, or give the "
            "--workdir of a run."
        )
    content = read_object(path)
    if not all(isinstance(content.get(name), dict) for name in _SECTIONS):
        raise UserError(f"{path} was not written by abe_jax; give another --workdir.")
    return content


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object.")
    return content


def of_workdir(workdir: str | os.PathLike[str]) -> ConfigDict:
    """The config of a run, from what it left in its workdir.

    Fields that the run's version did not have get their defaults; fields that this
    version no longer has are left out.

    Raises:
      UserError: see `stored`, or a field is of another type than here.
    """
    config = _defaults()
    try:
        config.update(_common(config, _with_tuples(stored(workdir))))
    except TypeError as error:
        path = locate(workdir) / CONFIG_FILE
        raise UserError(f"{path} is of another version: {error}.") from error
    return config


get_config = of_workdir  # as a config file has it


def require_known(config: Any) -> None:
    """Checks a config's fields against `configs/default.py`, as overrides are.

    Raises:
      UserError: it is no config, or a field is unknown, missing or of another type.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config: get_config() gives a {type(config).__name__}; it must give a "
            "ConfigDict, such as configs.default.get_config()."
        )
    fields.require_known(config, fields.flat(_defaults()))


def _common(config: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stored config that this version has as well."""
    return {
        name: _common(config[name], value)
        if isinstance(value, dict) and isinstance(config[name], ConfigDict)
        else value
        for name, value in stored.items()
        if name in config
    }


def _defaults() -> ConfigDict:
    # By its path: `configs` may be another project's package here.
    spec = importlib.util.spec_from_file_location(
        "abe_jax_default_config", _CONFIGS / "default.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _with_tuples(value: Any) -> Any:
    # JSON has lists only, configs have tuples only.
    if isinstance(value, dict):
        return {name: _with_tuples(field) for name, field in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
