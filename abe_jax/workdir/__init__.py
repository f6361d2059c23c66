"""The folder of a run: its config, checkpoints, metrics, and what is where."""
