"""Starts the command line as users do, and reads what a run leaves behind."""

import json
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

# A trunk so narrow, and birds so few, that a run is little more than compilation.
SMALL = [
    "--config=configs/quickstart.py",
    "--config.model.width=0.05",
    "--config.model.num_learners=2",
    "--config.model.embedding_dim=8",
    "--config.data.image_size=32",
    "--config.data.load_size=32",
    "--config.data.birds_classes=16",
    "--config.data.birds_images_per_class=8",
    "--config.data.images_per_class=4",
    "--config.train.batch_size=16",
    "--config.train.log_every=2",
    "--config.train.eval_every=4",
    "--config.train.checkpoint_every=4",
]


def start(*arguments, module="abe_jax.main", **options):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def run(*arguments, **options):
    with start(*arguments, **options) as process:
        try:
            output, errors = process.communicate(timeout=500)
        finally:
            process.kill()  # where it did not end in time
    return process.returncode, output, errors


def lines_of(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    timed = ("images_per_second", "seconds")
    kept = [
        {k: v for k, v in line.items() if not any(t in k for t in timed)}
        for line in lines
    ]
    return [line for line in kept if len(line) > 1]


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
