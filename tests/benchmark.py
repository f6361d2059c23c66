"""The scripts of benchmarks/, which are no package, as modules."""

import importlib.util
import sys

from command_line import ROOT


def load(name):
    """The module of `benchmarks/NAME.py`."""
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
