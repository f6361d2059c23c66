"""A long run of a tiny network: memory and descriptors must stay flat.

python tests/faults/soak.py 20000
"""

import json
import os
import pathlib
import sys
import tempfile

sys.path[:0] = [str(pathlib.Path(__file__).parents[n]) for n in (0, 2)]


def soak(config_of, folder: pathlib.Path, steps: int) -> dict[str, list[float]]:
    """Trains for `steps` steps, with twenty evaluations and forty checkpoints.

    Returns:
      "rss_mb" and "descriptors" of the process, after each tenth of the run but the
      first.
    """
    from abe_jax import train
    from abe_jax.train import progress

    figures: dict[str, list[float]] = {"rss_mb": [], "descriptors": []}
    add = progress.Reporter.add

    def add_and_look(self, step, arrays):
        add(self, step, arrays)
        if step % (steps // 10) == 0 and step > steps // 10:
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            figures["rss_mb"].append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            figures["descriptors"].append(len(os.listdir("/proc/self/fd")))

    progress.Reporter.add = add_and_look
    try:
        config = config_of(
            steps=steps,
            log_every=10,
            eval_every=steps // 20,
            checkpoint_every=steps // 40,
            learning_rate=1e-4,
        )
        config.data.in_memory = True
        train.train_and_evaluate(config, str(folder / "run"))
    finally:
        progress.Reporter.add = add
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [m["step"] for m in map(json.loads, lines) if "train/loss" in m]
    assert logged == [1, *range(10, steps + 1, 10)]
    return figures


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import conftest
    import pytest

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        tiny = conftest.tiny.__wrapped__(patch)
        figures = soak(tiny, pathlib.Path(folder), int(sys.argv[1]))
    for name, values in figures.items():
        print(f"{name}: {', '.join(f'{value:.0f}' for value in values)}")


if __name__ == "__main__":
    main()
