"""The processes that read images."""

import gc
import os
import signal


def start_worker(worker_id: int) -> None:
    """Leave signals to the main process, which finishes its step first; and spare the memory that both share.

    The garbage collector would write to the parent's objects, and so copy their pages into each worker.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()


def usable_workers(num_workers: int) -> int:
    """Return at most as many workers as there are cores; more only get in each other's way."""
    return min(num_workers, os.cpu_count() or 1)
