"""Data sets on disk to prepared records: `python -m abe_jax.prepare`."""
