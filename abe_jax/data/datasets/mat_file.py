"""MATLAB files, read in a process of their own.

SciPy's reader can crash the process that calls it: a damaged file makes it write out of
bounds. What is read comes back as JSON.
"""

import json
import subprocess
import sys
from typing import Any


def load(path: str, variable: str) -> list[Any]:
    """The elements of a variable: dicts by field name of a struct array, else values.

    Raises:
      ValueError: no such file or variable, or a damaged one; the text says why.
    """
    # This file alone is run: what lies beside it is not to be imported.
    command = [sys.executable, "-P", __file__, path, variable]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode < 0:
        raise ValueError("it is damaged")
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").split("\n")
        raise ValueError(next((x for x in reversed(lines) if x.strip()), "damaged"))
    return json.loads(done.stdout)


def _read(path: str, variable: str) -> list[Any]:
    from scipy import io

    # squeeze_me makes a scalar of a struct array of one row.
    rows = io.loadmat(path, squeeze_me=True)[variable].reshape(-1)
    names = rows.dtype.names
    if names is None:
        return rows.tolist()
    return [{name: row[name] for name in names} for row in rows]


if __name__ == "__main__":
    print(json.dumps(_read(*sys.argv[1:]), default=lambda value: value.tolist()))
