"""A rank notices that its launcher has ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import sys, threading
from latte_flow.training.monitor.launcher import watch_launcher
lost = threading.Event()
watch_launcher(lost.set, every=0.05)
print("watching", flush=True)
print("lost" if lost.wait(30) else "still there", flush=True)
"""
LAUNCH = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
RUNNER = "import subprocess, sys; subprocess.run([sys.executable, sys.argv[1], sys.argv[2]])"


def start(*command) -> subprocess.Popen:
    """Start a process in a session of its own, whose rank has begun to watch."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "watching\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_launcher_that_is_killed(number):
    launcher = start(sys.executable, "-c", LAUNCH, RANK)
    launcher.send_signal(number)
    assert launcher.stdout.readline() == "lost\n"
    launcher.wait()


def test_the_runner_above_deepspeeds_launcher_of_the_node(tmp_path):
    """``deepspeed`` starts deepspeed.launcher.launch, which lives on when the runner is killed."""
    launch = tmp_path / "deepspeed.launcher.launch"  # known by its command line
    launch.write_text(LAUNCH)
    runner = start(sys.executable, "-c", RUNNER, launch, RANK)
    os.kill(runner.pid, signal.SIGKILL)
    assert runner.stdout.readline() == "lost\n"
    runner.wait()
