"""A rank notices that its launcher has ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import os, threading, time
from latte_flow.training.monitor.launcher import launchers, watch_launcher
started_by = launchers()
print("watching", flush=True)
{imports}
lost = threading.Event()
watch_launcher(lost.set, started_by, every=0.05)
print("lost" if lost.wait(30) else "still there", flush=True)
"""
AT_ONCE, LATE = (
    RANK.replace("{imports}", code) for code in ("", "while os.getppid() == started_by[0][1]: time.sleep(0.01)")
)
"""The second is still importing when its launcher ends."""
LAUNCH = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
RUNNER = "import subprocess, sys; subprocess.run([sys.executable, sys.argv[1], sys.argv[2]])"


def start(*command) -> subprocess.Popen:
    """Start a process in a session of its own, whose rank has begun to watch."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "watching\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.parametrize("rank", [AT_ONCE, LATE], ids=["training", "starting"])
def test_a_launcher_that_is_killed(number, rank):
    launcher = start(sys.executable, "-c", LAUNCH, rank)
    launcher.send_signal(number)
    assert launcher.stdout.readline() == "lost\n"
    launcher.wait()


def test_the_runner_above_deepspeeds_launcher_of_the_node(tmp_path):
    """``deepspeed`` starts deepspeed.launcher.launch, which lives on when the runner is killed."""
    launch = tmp_path / "deepspeed.launcher.launch"  # known by its command line
    launch.write_text(LAUNCH)
    runner = start(sys.executable, "-c", RUNNER, launch, AT_ONCE)
    os.kill(runner.pid, signal.SIGKILL)
    assert runner.stdout.readline() == "lost\n"
    runner.wait()
