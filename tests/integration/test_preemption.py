"""Stopping a run in the middle, by a file or a signal: it leaves a checkpoint, and goes on as if nothing had happened."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.integration.launching import Ranks, column
from training.checkpoint_manifest import list_checkpoints
from training.preemption import EXIT_STOPPED

STEPS = 10_000
"""More than are ever trained here: every run is stopped long before."""


def wait_for_steps(run: Ranks, output_dir: Path, count: int) -> None:
    """Wait until a run has logged some steps."""
    file = output_dir / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < count:
        assert run.processes[0].is_alive(), run.log.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        pytest.param("file", 0, id="stop-file"),
        pytest.param(signal.SIGUSR1, 1, id="usr1-with-data-workers"),
        pytest.param(signal.SIGTERM, 0, id="term"),
    ],
)
def test_a_stopped_run_leaves_a_checkpoint_and_resumes(command, tmp_path, how, workers):
    output = tmp_path / "run"
    fields = {"checkpoint__every": STEPS, "sample__every": 0, "data__num_workers": workers}
    run = command.start(output, max_steps=STEPS, **fields)
    wait_for_steps(run, output, 3)
    if how == "file":
        (output / "stop").touch()
    else:
        os.kill(run.processes[0].pid, how)
    finished = run.wait()
    assert finished.code == EXIT_STOPPED, finished.output
    (checkpoint,) = list_checkpoints(output / "checkpoints")
    stopped_at = int(checkpoint.name.removeprefix("step_"))
    assert 3 <= stopped_at < STEPS
    assert column(output, "step")[-1] == stopped_at
    assert (output / "requeue").exists()
    assert not (output / "stop").exists()

    goal = stopped_at + 3
    command.train(output_dir=output, max_steps=goal, **fields)
    assert not (output / "requeue").exists()
    assert column(output, "step") == list(range(1, goal + 1))
    if how == "file":
        whole = command.train(max_steps=goal, **fields)
        assert column(output, "loss") == column(whole.output_dir, "loss")
