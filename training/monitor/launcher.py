"""Whether the launcher of this rank is still there.

A launcher that is killed (SIGKILL, or SIGTERM and SIGHUP to ``deepspeed``, which passes neither on) leaves its ranks training.
They would train on beside the run that the same command starts again.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

LOOK_SECONDS = 1.0
DEEPSPEED_NODE_LAUNCHER = b"deepspeed.launcher.launch"
"""The process of a node that ``deepspeed`` starts, and that starts the ranks. It outlives the runner above it."""


def _parent(pid: int) -> int | None:
    """Return the parent of a process; None when it is gone, or where there is no /proc."""
    try:
        # After the name in brackets, which may hold anything: the state, then the parent.
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def launchers() -> list[tuple[int, int]]:
    """Return (process, its parent) for this rank, and for DeepSpeed's launcher of the node above it if there is one."""
    own = os.getppid()
    pairs = [(os.getpid(), own)]
    try:
        command = Path(f"/proc/{own}/cmdline").read_bytes()
    except OSError:
        return pairs
    above = _parent(own)
    if DEEPSPEED_NODE_LAUNCHER in command and above is not None:
        pairs.append((own, above))
    return pairs


def watch_launcher(lost: Callable[[], None], *, every: float = LOOK_SECONDS) -> threading.Thread:
    """Call ``lost`` once, from a thread, when a launcher above this rank has ended: its child then has another parent.

    Args:
        lost: takes the rank's request to stop.
        every: seconds between two looks.
    """
    pairs = launchers()

    def look() -> None:
        while all(_parent(process) == parent for process, parent in pairs):
            time.sleep(every)
        lost()

    thread = threading.Thread(target=look, name="launcher", daemon=True)
    if all(_parent(process) == parent for process, parent in pairs):  # false where there is no /proc
        thread.start()
    return thread
