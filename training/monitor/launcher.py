"""Detects that the launcher of this rank is gone.

The ranks of a killed launcher (SIGKILL, or SIGTERM and SIGHUP to ``deepspeed``, which forwards neither) keep training. They would
run concurrently with the run that the same command starts again.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

LOOK_SECONDS = 1.0
DEEPSPEED_NODE_LAUNCHER = b"deepspeed.launcher.launch"
"""The process that ``deepspeed`` starts on each node to start the ranks. It outlives the runner above it."""


def _parent(pid: int) -> int | None:
    """Return the parent of a process, or None if it is gone or there is no /proc."""
    try:
        # After the name in parentheses, which may contain any character: the state, then the parent.
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def launchers() -> list[tuple[int, int]]:
    """Return (process, its parent) for this rank and, if it has one, for DeepSpeed's node launcher above it."""
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


def watch_launcher(
    lost: Callable[[], None], pairs: list[tuple[int, int]], *, every: float = LOOK_SECONDS
) -> threading.Thread:
    """Call ``lost`` once, from a thread, when a launcher above this rank has ended: its child then has another parent.

    Args:
        lost: requests the rank to stop.
        pairs: what ``launchers`` returned when the rank started; a launcher that has ended since is noticed too.
        every: seconds between checks.
    """

    def look() -> None:
        while all(_parent(process) == parent for process, parent in pairs):
            time.sleep(every)
        lost()

    thread = threading.Thread(target=look, name="launcher", daemon=True)
    if _parent(os.getpid()) is not None:  # None where there is no /proc
        thread.start()
    return thread
