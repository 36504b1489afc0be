"""Stopping a run in the middle, by a file or a signal: it leaves a checkpoint, and goes on as if nothing had happened."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.launching import ROOT, TINY_RUN, column, environment, free_port, train_alone
from training.checkpoint import list_checkpoints
from training.preemption import EXIT_STOPPED

STEPS = 400
"""More than are ever trained here: every run is stopped long before."""


def start(output: Path, *arguments: str) -> subprocess.Popen:
    """Start a run on its only rank and wait until it has logged some steps."""
    env = environment() | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "training/main.py", *TINY_RUN, "--output_dir", str(output)]
    command += ["--max_steps", str(STEPS), "--checkpoint.every", str(STEPS), *arguments]
    with (output.parent / f"{output.name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    while process.poll() is None:
        file = output / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= 3:
            return process
        time.sleep(0.05)
    raise AssertionError((output.parent / f"{output.name}.log").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    ("how", "arguments"),
    [
        pytest.param("file", [], id="stop-file"),
        pytest.param(signal.SIGUSR1, ["--data.num_workers", "1"], id="usr1-with-data-workers"),
        pytest.param(signal.SIGTERM, [], id="term"),
    ],
)
def test_a_stopped_run_leaves_a_checkpoint_and_resumes(runs, request, how, arguments):
    output = runs / request.node.callspec.id
    process = start(output, *arguments)
    if how == "file":
        (output / "stop").touch()
    else:
        process.send_signal(how)
    assert process.wait() == EXIT_STOPPED
    (checkpoint,) = list_checkpoints(output / "checkpoints")
    stopped_at = int(checkpoint.name.removeprefix("step_"))
    assert 3 <= stopped_at < STEPS
    assert column(output, "step")[-1] == stopped_at
    assert (output / "requeue").exists()
    assert not (output / "stop").exists()

    goal = stopped_at + 3
    same_run = [*TINY_RUN, "--max_steps", str(goal), "--checkpoint.every", str(STEPS), *arguments]
    resumed = train_alone(*same_run, "--output_dir", str(output))
    assert resumed.code == 0, resumed.output
    assert not (output / "requeue").exists()
    assert column(output, "step") == list(range(1, goal + 1))
    if how == "file":
        whole = train_alone(*same_run, "--output_dir", str(runs / "whole"))
        assert whole.code == 0, whole.output
        assert column(output, "loss") == column(runs / "whole", "loss")
