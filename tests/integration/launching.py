"""Start training the way a user does: the real deepspeed launcher, real processes, gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY_RUN = ["--global_batch_size", "32", "--logging.every", "1", "--sample.every", "0", "--checkpoint.every", "4"]
"""The digits preset at a size that takes a fraction of a second a step."""


@dataclass
class Finished:
    """A finished program: its exit code and everything it printed."""

    code: int
    output: str


def environment(threads: int = 1) -> dict[str, str]:
    """Return the environment of a launch on the CPU: this checkout first, `threads` threads a process."""
    bin_folder = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",  # a path that is not there is also a hub id; nothing here may ask for it
    }


def run(command: list[str], *, env: dict | None = None, timeout: float = 1500) -> Finished:
    """Run a program in the repository; past the timeout its whole process group is killed and the test fails."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{command} did not end within {timeout} s; it printed:\n{output[-4000:]}") from None
    return Finished(process.returncode, output)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(output_dir: Path, *arguments: str, ranks: int = 1, threads: int = 1, zero: str = "zero2") -> Finished:
    """Train under the deepspeed launcher with a DeepSpeed configuration of ds_configs/."""
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), "training/main.py"]
    command += ["--deepspeed", f"ds_configs/{zero}.json", "--output_dir", str(output_dir), *arguments]
    return run(command, env=environment(threads))


def train_alone(*arguments: str) -> Finished:
    """Run training/main.py as the only rank, without a launcher: quicker where the launcher is not the point."""
    env = environment() | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return run([sys.executable, "training/main.py", *arguments], env=env)


def metrics(output_dir: Path) -> list[dict]:
    """Return the logged steps of a run."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def column(output_dir: Path, name: str) -> list[float]:
    """Return one number of every logged step of a run."""
    return [entry[name] for entry in metrics(output_dir)]
