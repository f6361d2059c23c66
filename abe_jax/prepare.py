"""Prepares data sets: `python -m abe_jax.prepare`; see `abe_jax.data.prepare`."""

from abe_jax.data.prepare.command import prepare, run
from abe_jax.data.prepare.encoding import Storing

__all__ = ["Storing", "prepare", "run"]

if __name__ == "__main__":
    run()
