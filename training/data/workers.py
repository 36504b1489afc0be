"""Processes that prepare batches, and signals: a stop request must not end them, and an exit must."""

import multiprocessing
import multiprocessing.util
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Requests to stop a run; see training/monitor/preemption.py."""


def ignore_stop_signals(_worker: int = 0) -> None:
    """Make a data worker deaf to the signals of a stop (torch's DataLoader calls it in each).

    SLURM signals every process of a job step. A worker that died of it would make the training process fail before its save.
    ``kill_workers_at_exit`` ends them instead.
    """
    signal.set_wakeup_fd(-1)  # a forked worker shares the training process's pipe
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers_at_exit() -> None:
    """Have data workers that are left when this process exits, after an error that is, ended by a signal that they do hear.

    multiprocessing would send them SIGTERM and wait for their end for ever, and the whole launch with it.
    """
    # Before multiprocessing ends its children itself.
    multiprocessing.util.Finalize(None, _kill_workers, exitpriority=100)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report the kill as one more failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
