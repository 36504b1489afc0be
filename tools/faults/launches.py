"""Starting a training launch, seeing its processes, and making sure that none of them is left.

A launch is one process group: the launcher, whose process id names it, and the ranks and data workers below it.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from latte_flow.training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.01
SHARED_MEMORY = Path("/dev/shm")


class Launch(Protocol):
    """A running launch: the launcher's process id, which is its process group's too."""

    pid: int

    def poll(self) -> int | None:
        """Return the launcher's exit code, negative for the signal that ended it; None while it runs."""


Starter = Callable[[str, Sequence[str], Path, Mapping[str, str]], Launch]
"""(script of this repository, its arguments, file that everything printed is appended to, further environment variables)."""


class DeepSpeedStarter:
    """Starts scripts with the real ``deepspeed`` launcher, always by the same command.

    Args:
        ranks: number of processes.
        port: of their rendezvous. Like a user's same command, all starts of a campaign share it.

    Raises:
        UserError: when there is no ``deepspeed`` command.
    """

    def __init__(self, ranks: int, port: int):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._launcher = shutil.which("deepspeed", path=path)
        if self._launcher is None:
            raise UserError("deepspeed: command not found; accepted: an environment with the packages of setup.cfg")
        self.ranks, self.port = ranks, port
        python_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = str(max((os.cpu_count() or 1) // ranks, 1))
        self._environment = {"OMP_NUM_THREADS": threads, **os.environ, "PATH": path}
        self._environment["PYTHONPATH"] = os.pathsep.join(python_path)

    def __call__(self, script: str, arguments: Sequence[str], log: Path, variables: Mapping[str, str]) -> Launch:
        """Start a script; see Starter."""
        command = [self._launcher, "--num_gpus", str(self.ranks), "--master_port", str(self.port), script, *arguments]
        with log.open("ab") as stream:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self._environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def close(self) -> None:
        """Remove what DeepSpeed leaves in memory on the CPU: 66 MiB a rank and port, which it never takes away."""
        for buffer in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{self.port}_*"):
            buffer.unlink()


def choose_port() -> int:
    """Return a free port below those that the system hands out by itself, so that it stays free between two starts.

    It is no part of the plan and does not depend on the seed: two campaigns on one machine must not meet.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def members(group: int) -> dict[int, int]:
    """Return the living processes of a process group: process id -> its parent's."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # "pid (name) state ppid pgrp ...", and the name may hold anything.
            state, parent, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state not in "ZX":
            found[int(folder.name)] = int(parent)
    return found


def with_descendants(processes: Sequence[int], group: int) -> list[int]:
    """Return some processes of a group and all below them: ranks and their data workers."""
    parents, result = members(group), list(processes)
    while more := [pid for pid, parent in parents.items() if parent in result and pid not in result]:
        result += more
    return result


def send(processes: Sequence[int], number: int) -> None:
    """Send a signal; a process that has just ended needs none."""
    for pid in processes:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def wait_for_end(launch: Launch, limit: float) -> bool:
    """Wait until the launcher and every process of its group have ended by themselves; kill what has not after ``limit`` seconds.

    Returns:
        False when something had to be killed.
    """
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if launch.poll() is not None and not members(launch.pid):
            return True
        time.sleep(POLL_SECONDS)
    kill_group(launch)
    return False


def kill_group(launch: Launch) -> list[int]:
    """Kill every process of a launch and wait until none is left; return which there were."""
    alive = list(members(launch.pid))
    while members(launch.pid) or launch.poll() is None:
        send(list(members(launch.pid)), signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return alive
