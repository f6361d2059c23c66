"""Using what was trained: embed, search, export. `abe_jax.load` opens a run."""
