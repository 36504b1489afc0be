"""Signal handling of data workers: a stop request must not end them, and an exit must."""

import multiprocessing
import multiprocessing.util
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that request a run to stop; see training/monitor/preemption.py."""


def ignore_stop_signals(_worker: int = 0) -> None:
    """Make a data worker ignore the stop signals (torch's DataLoader calls this in each worker).

    SLURM signals every process of a job step. If a worker died from it, the training process would fail before saving.
    ``kill_workers_at_exit`` ends the workers instead.
    """
    signal.set_wakeup_fd(-1)  # a forked worker shares the training process's pipe
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers_at_exit() -> None:
    """Kill data workers that are left when this process exits after an error with a signal they do not ignore.

    multiprocessing would send them SIGTERM and wait forever, and the whole launch with it.
    """
    # The priority makes it run before multiprocessing ends its children itself.
    multiprocessing.util.Finalize(None, _kill_workers, exitpriority=100)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report the kill as one more failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
