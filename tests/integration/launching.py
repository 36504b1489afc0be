"""Start the project's command lines as a user does, and wait for them.

``train`` goes through the real ``deepspeed`` launcher; a start costs 10 to 15 seconds, nearly all of it imports. ``start_ranks``
runs the same script, from the first line of its ``__main__`` to its exit code, in processes forked from one server that has
imported everything already. test_launched.py checks that both train the same numbers, bit for bit.

Both put this checkout first on the path: an installed package of the same name may be another one.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600.0
"""Seconds that any one command line may take, on a shared machine."""


@dataclass
class Finished:
    """A finished program: its exit code (negative: the signal that ended it) and everything it printed."""

    code: int
    output: str


def environment(threads: int = 1) -> dict[str, str]:
    """Return the environment of a command line on the CPU: this checkout first, `threads` threads a process."""
    bin_folder = str(Path(sys.executable).parent)
    return {
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),  # see launch/common.sh
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",  # a path that is not there is also a hub id; nothing here may ask for it
    }


PORTS = itertools.cycle(range(20_000, 32_000))
"""Below those that the kernel gives to connections, which could take one before it is used."""
deque(itertools.islice(PORTS, os.getpid() * 97 % 12_000), maxlen=0)  # not where another process of the tests starts


def free_port() -> int:
    """Return a port that nothing listens on."""
    while True:
        port = next(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def listening(process: Path) -> set[tuple[str, int]]:
    """Return the (address, port) pairs that a process, a folder of /proc, listens on."""
    found = set()
    sockets = {os.readlink(link) for link in (process / "fd").iterdir() if link.is_symlink()}
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in (process / "net" / table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                words, port = local.split(":")
                # Words of four bytes in the machine's order.
                packed = b"".join(struct.pack("=I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8))
                found.add((socket.inet_ntop(family, packed), int(port, 16)))
    return found


def run(
    command: list[str],
    *,
    cwd: Path = ROOT,
    env: dict | None = None,
    timeout: float = TIMEOUT,
    kill_when: Callable[[], bool] | None = None,
) -> Finished:
    """Run a program; past the timeout its whole process group is killed and the test fails.

    Args:
        command: the program and its arguments.
        cwd: its working directory; default: the repository.
        env: its environment; None for ``environment()``.
        timeout: in seconds.
        kill_when: asked every few milliseconds; when it is true the whole process group is killed, as by a power failure.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + timeout
    while True:
        try:
            output, _ = process.communicate(timeout=timeout if kill_when is None else 0.01)
            return Finished(process.returncode, output)
        except subprocess.TimeoutExpired:
            late = time.monotonic() > end
            if late or kill_when():
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                assert not late, f"{command} did not end within {timeout} s; it printed:\n{output[-4000:]}"
                return Finished(process.returncode, output)


def train(*arguments: str, ranks: int = 1, threads: int = 1, **options) -> Finished:
    """Train under the deepspeed launcher; options are those of ``run``."""
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), "training/main.py", *arguments]
    return run(command, env=environment(threads), **options)


SERVER = multiprocessing.get_context("forkserver")
"""Starts processes that have imported the command lines already. Its server starts with the first of them, in the environment
and the working directory of that moment (server_environment)."""
SERVER.set_forkserver_preload(["tests.integration.preload"])


@contextmanager
def server_environment() -> Iterator[None]:
    """Put this process into the environment and the working directory in which SERVER starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        yield


@dataclass
class Ranks:
    """A script of the repository that runs as ``__main__`` in forked processes, one a rank."""

    processes: list
    log: Path

    def wait(self, timeout: float = TIMEOUT) -> Finished:
        """Wait for all ranks; the first that fails ends the others, as under a launcher, and its exit code is returned.

        Past the timeout all are killed and the test fails.
        """
        end, code, running = time.monotonic() + timeout, 0, list(self.processes)
        while running and time.monotonic() < end:
            connection.wait([process.sentinel for process in running], end - time.monotonic())
            failed = [process for process in running if process.exitcode]
            running = [process for process in running if process.exitcode is None]
            if failed and code == 0:
                code = failed[0].exitcode
                for process in running:
                    process.terminate()
        for process in running:
            process.kill()
            process.join()
        output = self.log.read_text()
        assert not running, f"the program did not end within {timeout} s; it printed:\n{output[-4000:]}"
        return Finished(code, output)


def start_ranks(
    script: str,
    arguments: Sequence[str],
    log: Path,
    *,
    ranks: int = 1,
    hooks: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> Ranks:
    """Start a script, without waiting for it.

    Args:
        script: path in the repository.
        arguments: its command line.
        log: file for what all ranks print.
        ranks: number of processes; each gets the variables that the deepspeed launcher sets.
        hooks: functions of tests/integration/hooks.py, called before the script to watch it.
        variables: further environment variables.
    """
    log.write_text("")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        own = {**environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **(variables or {})}
        arguments_of_rank = (script, list(arguments), own, str(log), list(hooks))
        processes.append(SERVER.Process(target=_become, args=arguments_of_rank))
    for process in processes:
        process.start()
    return Ranks(processes, log)


def _become(script: str, arguments: list[str], variables: dict[str, str], log: str, hooks: list[str]) -> None:
    """Turn a forked process into a command line."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    # What a process that nobody forked starts its own children with.
    multiprocessing.set_start_method("fork", force=True)
    # tqdm's lock is a semaphore that forked processes share: one killed while holding it would stop all that follow.
    tqdm.set_lock(threading.RLock())
    for hook in hooks:
        getattr(importlib.import_module("tests.integration.hooks"), hook)()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def metrics(output_dir: Path) -> list[dict]:
    """Return the logged steps of a run."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def column(output_dir: Path, name: str) -> list[float]:
    """Return one number of every logged step of a run."""
    return [entry[name] for entry in metrics(output_dir)]
