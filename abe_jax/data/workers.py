"""How a worker process treats signals, and what it does once the main one is gone."""

import multiprocessing
import os
import signal
import threading


def follow_main_process() -> None:
    """Leaves Ctrl-C to the main process, and ends when that is gone.

    For the first lines of a process that `multiprocessing` started.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    assert main is not None

    def watch() -> None:
        main.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
