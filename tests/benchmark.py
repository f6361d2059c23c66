"""The scripts of benchmarks/, which are no package, as modules."""

import importlib
import sys

from command_line import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # they import each other


def load(name):
    """The module of `benchmarks/NAME.py`."""
    return importlib.import_module(name)
