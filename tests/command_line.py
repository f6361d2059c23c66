"""Starts the command line as users do, and reads what a run leaves behind."""

import contextlib
import json
import pathlib
import random
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

# A trunk so narrow, and birds so few, that a run is little more than compilation.
SMALL = [
    "--config=configs/quickstart.py",
    "--config.model.trunk=vit_small_patch16",  # the quickest to compile
    "--config.model.attention_blocks=1",
    "--config.model.width=0.05",
    "--config.model.num_learners=2",
    "--config.model.embedding_dim=8",
    "--config.data.image_size=32",
    "--config.data.load_size=32",
    "--config.data.birds_classes=16",
    "--config.data.birds_images_per_class=8",
    "--config.data.images_per_class=4",
    "--config.train.batch_size=16",
    "--config.train.schedule=constant",  # one program for any number of steps
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


def assert_left_alone(errors):
    """Of a process whose peer died: one line says so, and there is no traceback."""
    # Not always the last line: a thread of JAX's may report after it.
    said = [x for x in errors.splitlines() if "another process of this run ended" in x]
    beginnings = ("another process", "abe_jax: ended", "abe_jax: another process")
    assert said and said[-1].startswith(beginnings), errors
    assert said[-1].endswith("."), errors
    assert "Traceback" not in errors, errors


def freeing_late(seconds):
    """Lines before a program: Grain's thread that frees shared memory is late, as it
    may be when the processor is busy."""
    return f"""
import time
from grain.multiprocessing import SharedMemoryArray

free = SharedMemoryArray.close_shm_async

def late(*args):
    time.sleep({seconds})
    free(*args)

SharedMemoryArray.close_shm_async = late
"""


def free_port():
    """A port of this machine that nothing listens on.

    Below those that the system hands out: who is to listen binds it seconds later.
    """
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            port = random.randrange(20_000, 32_000)
            listener.bind(("127.0.0.1", port))
            return port
