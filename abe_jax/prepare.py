"""Prepares data sets: `python -m abe_jax.prepare`; see `abe_jax.data.prepare`."""

from abe_jax.data.prepare.command import prepare, run

__all__ = ["prepare", "run"]

if __name__ == "__main__":
    run()
