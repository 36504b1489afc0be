"""What goes wrong inside a run: numbers that are not finite, ranks that hang. It is counted, named, and costs no checkpoint."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from latte_flow.training.checkpoint.manifest import list_checkpoints
from latte_flow.training.checkpoint.opening import read_weights
from latte_flow.training.monitor.watchdog import EXIT_HUNG
from tests.integration.launching import Ranks, column, metrics
from tests.integration.test_resume import assert_same_metrics
from tests.integration.test_training import STEPS, assert_weights_equal


def wait_for_steps(run: Ranks, output_dir: Path, count: int) -> None:
    """Wait until a run has logged some steps."""
    file = output_dir / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < count:
        assert run.processes[0].is_alive(), run.log.read_text()
        time.sleep(0.05)


def assert_same_weights(run, one: int, other: int) -> None:
    for which in ("model", "ema"):
        before, after = (read_weights(run.checkpoint(step), which) for step in (one, other))
        assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.fixture(scope="module")
def poisoned(command):
    """Samples 70, 71 (step 3) and 230 (step 8) are not finite. The run dies after step 6 and resumes with one rank, not two."""
    fields = {"checkpoint__every": 1, "checkpoint__keep_last": 0, "sample__every": 0}
    poison = {"POISON": "70 71 230 230"}
    died = command.train(
        ranks=2, hooks=("poison", "die_after_step"), variables=poison | {"DIE_AFTER_STEP": "6"}, code=9, **fields
    )
    return command.train(output_dir=died.output_dir, hooks=("poison",), variables=poison, **fields)


@pytest.fixture(scope="module")
def poisoned_zero3(command):
    """The same in one go, where another part of DeepSpeed looks at the gradients."""
    fields = {"checkpoint__every": 1, "checkpoint__keep_last": 0, "sample__every": 0, "precision": "bf16"}
    return command.train(ranks=2, zero="zero3", hooks=("poison",), variables={"POISON": "70 71 230 230"}, **fields)


@pytest.mark.parametrize("fixture", ["poisoned", "poisoned_zero3"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_its_samples_named(request, fixture):
    run = request.getfixturevalue(fixture)
    assert column(run.output_dir, "step") == list(range(1, STEPS + 1))
    assert column(run.output_dir, "skipped_steps") == [0, 0, 1, 1, 1, 1, 1, 2]
    entries = metrics(run.output_dir)
    assert entries[2]["skipped"] == [{"step": 3, "samples": [64, 95], "nonfinite_loss": [70, 71]}]
    assert entries[7]["skipped"] == [{"step": 8, "samples": [224, 255], "nonfinite_loss": [230]}]
    for i, entry in enumerate(entries):
        if i in (2, 7):
            assert (entry["loss"], entry["grad_norm"]) == (None, None)
        else:
            assert "skipped" not in entry
            assert 1 < entry["loss"] < 2
    # A checkpoint in a row of skipped steps would be newer than the one from before; only the end of the run is one.
    assert [path.name for path in list_checkpoints(run.output_dir / "checkpoints")] == [
        f"step_000000{step}" for step in (1, 2, 4, 5, 6, 7, 8)
    ]
    assert_same_weights(run, 7, 8)
    with pytest.raises(AssertionError):
        assert_same_weights(run, 6, 7)


def test_many_in_a_row_end_the_run_with_a_checkpoint_from_before(command, one_rank):
    """Everything from step 4 on is not finite; the last checkpoint before is that of step 1."""
    fields = {"checkpoint__every": 100, "health__max_skipped_steps": 3, "sample__every": 0}
    poison = {"hooks": ("poison",), "variables": {"POISON": "96 9999"}}
    run = command.train(code=2, **poison, **fields)
    message = "error: health.max_skipped_steps: 3 consecutive steps, 4 to 6, were skipped because their loss or gradient is not"
    assert message in run.finished.output
    assert [path.name for path in list_checkpoints(run.output_dir / "checkpoints")] == ["step_0000003"]
    assert [entry["step"] for entry in metrics(run.output_dir)[-1]["skipped"]] == [6]
    again = command.train(output_dir=run.output_dir, code=2, **poison, **fields)
    assert f"resumed from {run.checkpoint(3)}" in again.finished.output
    assert message in again.finished.output
    fixed = command.train(output_dir=run.output_dir, **fields)
    assert_same_metrics(fixed, one_rank)
    assert_weights_equal(fixed, one_rank, STEPS)
    assert column(fixed.output_dir, "skipped_steps") == [0] * STEPS


def test_a_rank_that_hangs_ends_the_run_and_is_named(command):
    run = command.train(
        ranks=2, checkpoint__every=1, health__hang_minutes=0.05, hooks=("hang_in_step",), variables={"HANG": "1 3"},
        code=EXIT_HUNG,
    )  # fmt: skip
    (line,) = [line for line in run.finished.output.splitlines() if line.startswith("error:")]
    assert "no progress for 0.05 minutes (health.hang_minutes)" in line
    assert "in step 3: rank 1 is in step 3, data, while the others are in step 3, " in line
    assert "wait_for_ever" in run.finished.output  # where it stands in the code
    assert [path.name for path in list_checkpoints(run.output_dir / "checkpoints")][-1] == "step_0000002"


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "error: rank 0, which tracks all ranks, does not answer"),
        (1, "rank 1 does not answer: its process is stopped"),
    ],
)
def test_a_rank_that_is_stopped_from_outside_is_named(command, tmp_path, rank, message):
    run = command.start(tmp_path / "run", ranks=2, max_steps=10_000, sample__every=0, health__hang_minutes=0.05)
    wait_for_steps(run, tmp_path / "run", 3)
    os.kill(run.processes[rank].pid, signal.SIGSTOP)
    other = run.processes[1 - rank]
    other.join(120)
    run.processes[rank].kill()
    assert other.exitcode == EXIT_HUNG, run.log.read_text()
    assert message in run.log.read_text()
