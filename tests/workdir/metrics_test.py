"""Lines of metrics: whole, once, and none of a future that did not happen."""

import importlib.util
import json
import math
import resource
import subprocess
import sys

import pytest
from tensorboardX.proto import event_pb2

from abe_jax.workdir import NotWritable, metrics


def lines(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, *records, resume_step=0, evaluates=False):
    writer = metrics.MetricWriter(workdir, resume_step=resume_step, evaluates=evaluates)
    for step, values in records:
        writer.write(step, values)
    writer.sync()
    writer.close()


def test_lines_are_appended_and_later_ones_dropped_on_a_resume(tmp_path):
    write(tmp_path, (1, {"train/loss": 3.0}), (2, {"train/loss": 2.0}))
    write(tmp_path, (2, {"train/loss": 2.5}), resume_step=1)
    assert lines(tmp_path) == [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.5},
    ]


def test_an_evaluation_of_the_resume_step_is_written_once(tmp_path):
    records = [(4, {"train/loss": 3.0}), (4, {"eval/recall@1": 0.5})]
    write(tmp_path, *records)
    write(tmp_path, records[1], resume_step=4, evaluates=True)
    write(tmp_path, resume_step=4)
    assert [(m.pop("step"), m) for m in lines(tmp_path)] == records
    assert metrics.evaluation_at(tmp_path, 4) == {"eval/recall@1": 0.5}
    assert metrics.evaluation_at(tmp_path, 3) is None


@pytest.mark.parametrize("cut", [1, 5, 20, 30])
def test_a_torn_line_is_dropped(tmp_path, cut, caplog):
    write(tmp_path, (1, {"train/loss": 3.0}), (2, {"train/loss": 2.0}))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    write(tmp_path, (2, {"train/loss": 2.0}), resume_step=1)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage", [b"\x00" * 50, b"\xff\xfe\n", b"[]\n", b'{"a": 1}\n']
)
def test_what_follows_damage_is_dropped_and_told(tmp_path, damage, caplog):
    write(tmp_path, (1, {"train/loss": 3.0}))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    assert metrics.read(tmp_path) == [{"step": 1, "train/loss": 3.0}]
    assert "what follows line 1 is damaged" in caplog.text


def test_a_full_disk_leaves_whole_lines(tmp_path):
    writer = metrics.MetricWriter(tmp_path, resume_step=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(NotWritable, match="make room there, and run the same"):
            for step in range(100):
                writer.write(step, {"train/loss": 1 / 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.close()
    assert [m["step"] for m in lines(tmp_path)] == list(range(len(lines(tmp_path))))
    assert len(lines(tmp_path)) > 3


def test_what_is_not_finite_is_null_in_json(tmp_path):
    write(tmp_path, (1, {"a": math.nan, "b": math.inf, "c": 1.0}))
    assert lines(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]


def events(path):
    content, found, start = path.read_bytes(), [], 0
    while start < len(content):
        size = int.from_bytes(content[start : start + 8], "little")
        found.append(event_pb2.Event.FromString(content[start + 12 :][:size]))
        start += size + 16
    return found


def test_tensorboard_gets_every_value_at_once(tmp_path):
    writer = metrics.MetricWriter(tmp_path, resume_step=0)
    writer.write(3, {"eval/recall@1": 0.5})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    last = events(path)[-1]
    (value,) = last.summary.value
    assert (last.step, value.tag, value.simple_value) == (
        3,
        "eval/recall_at_1",
        0.5,
    )
    writer.close()


def test_tensorboard_drops_what_a_start_from_the_beginning_writes_again(tmp_path):
    for _ in range(2):
        writer = metrics.MetricWriter(tmp_path, resume_step=0, evaluates=True)
        writer.write(0, {"eval/recall@1": 0.1})
        writer.close()
    steps = [
        event.step
        for path in tmp_path.glob("events.out.tfevents.*")
        for event in events(path)
        if event.HasField("session_log")
    ]
    assert steps == [1]


@pytest.mark.peers
def test_pytorch_is_not_imported():
    """It is installed beside the peers, and takes longer than all the rest."""
    assert importlib.util.find_spec("torch")
    code = "import sys, abe_jax.train; assert 'torch' not in sys.modules; import torch"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
