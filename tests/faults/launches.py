"""Starting a training launch, seeing its processes, and making sure that none of them is left.

A launch is one process group: the launcher, whose process id names it, and the ranks and data workers below it.
"""

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import psutil
import torch

from tests.faults.plan import RANKS
from tests.integration.launching import ROOT, SERVER, _become, environment, free_port

POLL_SECONDS = 0.01
ACCELERATOR = os.environ.get("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
"""Of the real launcher's ranks; read before a fixture of the integration tests sets it to the CPU."""


class Launch(Protocol):
    """A running launch: the launcher's process id, which is its process group's too."""

    pid: int

    def poll(self) -> int | None:
        """Return the launcher's exit code, negative for the signal that ended it; None while it runs."""


Starter = Callable[[str, Sequence[str], Path, Mapping[str, str]], Launch]
"""(script of this repository, its arguments, file that everything printed is appended to, further environment variables)."""


def start_deepspeed(
    port: int, script: str, arguments: Sequence[str], log: Path, variables: Mapping[str, str]
) -> subprocess.Popen:
    """Start a script with the real ``deepspeed`` launcher; with a port a Starter.

    Args:
        port: of the ranks' rendezvous. Like a user's same command, all starts of a campaign share it.
        script, arguments, log, variables: see Starter.
    """
    command = ["deepspeed", "--num_gpus", str(RANKS), "--master_port", str(port), script, *arguments]
    threads = max((os.cpu_count() or 1) // RANKS, 1)
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(threads), "DS_ACCELERATOR": ACCELERATOR, **variables},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@dataclass
class ForkedLaunch:
    """A launcher like DeepSpeed's, forked: it and its ranks have imported everything already."""

    process: BaseProcess

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode


def start_forked(script: str, arguments: Sequence[str], log: Path, variables: Mapping[str, str]) -> ForkedLaunch:
    """Start a launcher and its ranks by a fork; a Starter."""
    log.write_text("")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    process = SERVER.Process(
        target=_launch, args=(script, list(arguments), str(log), {**environment(), **shared, **variables})
    )
    process.start()
    return ForkedLaunch(process)


def _launch(script: str, arguments: list[str], log: str, variables: dict[str, str]) -> None:
    """Do what deepspeed/launcher/launch.py does: start the ranks; when one fails end all, by SIGTERM, then by SIGKILL."""
    os.setsid()
    fork = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(RANKS):
        own = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(fork.Process(target=_become, args=(script, arguments, own, log, [])))
        ranks[-1].start()
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        time.sleep(0.02)
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    for rank in ranks:
        rank.terminate()
    end = time.monotonic() + 30
    for rank in ranks:
        rank.join(max(end - time.monotonic(), 0))
        rank.kill()
    os._exit(code % 256)


def choose_port() -> int:
    """Return a free port below those that the system hands out by itself, so that it stays free between two starts.

    It is no part of the plan and does not depend on the seed: two campaigns on one machine must not meet.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def members(group: int) -> list[int]:
    """Return the living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                found.append(process.pid)
    return found


def with_descendants(processes: Sequence[int]) -> list[int]:
    """Return processes and all below them: ranks and their data workers."""
    below = [child.pid for pid in processes for child in psutil.Process(pid).children(recursive=True)]
    return [*processes, *below]


def send(processes: Sequence[int], number: int) -> None:
    """Send a signal; a process that has just ended needs none."""
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


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


def kill_group(launch: Launch) -> None:
    """Kill every process of a launch and wait until none is left."""
    while (alive := members(launch.pid)) or launch.poll() is None:
        send(alive, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
