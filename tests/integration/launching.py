"""Start the project's command lines as a user does, and wait for them.

``train`` goes through the real ``deepspeed`` launcher; a start costs 10 to 15 seconds, nearly all of it imports. ``Ranks.run``
runs the same script, from the first line of its ``__main__`` to its exit code, in processes forked from one server that has
imported everything already. test_training.py checks that both train the same numbers, bit for bit.

Both put this checkout first on the path: an installed package of the same name may be another one.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1500.0
"""Seconds that any one command line may take: a shared machine, and a first start that compiles DeepSpeed's operator."""


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


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    command: list[str],
    *,
    env: dict | None = None,
    timeout: float = TIMEOUT,
    kill_when: Callable[[], bool] | None = None,
) -> Finished:
    """Run a program in the repository; past the timeout its whole process group is killed and the test fails.

    Args:
        command: the program and its arguments.
        env: its environment; None for ``environment()``.
        timeout: in seconds.
        kill_when: asked every few milliseconds; when it is true the whole process group is killed, as by a power failure.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
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


def train(
    output_dir: Path, *arguments: str, ranks: int = 1, threads: int = 1, zero: str = "zero2", **options
) -> Finished:
    """Train under the deepspeed launcher with a DeepSpeed configuration of ds_configs/; options are those of ``run``."""
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), "training/main.py"]
    command += ["--deepspeed", f"ds_configs/{zero}.json", "--output_dir", str(output_dir), *arguments]
    return run(command, env=environment(threads), **options)


class Ranks:
    """Runs scripts of the repository in forked processes that have imported their modules already.

    The server of these processes starts with the first run, in the environment and the working directory of that moment.
    """

    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["training.main", "tools.sample"])

    def run(
        self,
        script: str,
        arguments: Sequence[str],
        log: Path,
        *,
        ranks: int = 1,
        hooks: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
    ) -> Finished:
        """Run a script as ``__main__`` in the repository's root, once a rank; past the timeout all ranks are killed.

        Args:
            script: path in the repository.
            arguments: its command line.
            log: file for what all ranks print.
            ranks: number of processes; each gets the variables that the deepspeed launcher sets.
            hooks: functions of tests/integration/hooks.py, called before the script to watch it.
            variables: further environment variables.
            timeout: in seconds.

        Returns:
            The first exit code that is not 0, if any.
        """
        log.write_text("")
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        processes = []
        for rank in range(ranks):
            own = {**environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **(variables or {})}
            arguments_of_rank = (script, list(arguments), own, str(log), list(hooks))
            processes.append(self._context.Process(target=_become, args=arguments_of_rank))
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        assert not late, f"{script} did not end within {timeout} s; it printed:\n{log.read_text()[-4000:]}"
        return Finished(next((p.exitcode for p in processes if p.exitcode), 0), log.read_text())


def _become(script: str, arguments: list[str], variables: dict[str, str], log: str, hooks: list[str]) -> None:
    """Turn a forked process into a command line."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # what a process that nobody forked starts its own children with
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
