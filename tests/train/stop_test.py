"""Signals that ask a run to end, and the loss of its terminal."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys

import pytest
from command_line import ROOT

from abe_jax import interrupts
from abe_jax.train import progress
from abe_jax.train.stop import StopRequest, StopRequested


@pytest.fixture(autouse=True)
def _handlers_are_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_remembered(number):
    with StopRequest(lambda raised: raised) as stop:
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(StopRequested):
            stop.check()
        assert stop.signal_number == number


def test_a_second_ctrl_c_is_impatience():
    with StopRequest(lambda raised: raised):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_nohup_keeps_a_run_from_ending():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(lambda raised: raised) as stop:
            signal.raise_signal(signal.SIGHUP)
            stop.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_second_sighup_leaves_a_mode_the_time_to_clear_up():
    cleared = False
    with pytest.raises(SystemExit) as ended, interrupts.ended_by_others_too():
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)
            cleared = True
    assert cleared and ended.value.code == 128 + signal.SIGHUP


# Its terminal goes while it runs; the shell and the kernel each send SIGHUP.
_CONNECTED = """
import fcntl, os, signal, sys, termios, time
from abe_jax.train.stop import StopRequest, StopRequested

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with StopRequest(lambda raised: raised) as stop:
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.01)
            stop.check()
    except StopRequested:
        signal.raise_signal(signal.SIGHUP)
        print("to nobody", flush=True)
        print("to nobody", file=sys.stderr, flush=True)
        os.write(int(sys.argv[1]), b"saved")
sys.exit(128 + stop.signal_number)
"""


def test_a_lost_connection_lets_it_save():
    parent, child = pty.openpty()
    saved, save = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", _CONNECTED, str(save)],
        cwd=ROOT,
        stdin=child,
        stdout=child,
        stderr=child,
        pass_fds=(save,),
        start_new_session=True,
    )
    os.close(child)
    os.close(save)
    try:
        shown = b""
        while b"ready" not in shown:
            shown += os.read(parent, 4096)
        os.close(parent)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
        assert os.read(saved, 9) == b"saved"
    finally:
        process.kill()
        os.close(saved)


def test_a_bar_outlives_its_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress._Progress(start=0, stop=9, batch_size=16)
    assert bar._bar is not None
    bar.update(1, 0.5, 10.0)
    bar.line("evaluation at step 1")
    bar.close()
