"""checkpoint.asynchronous: training continues while a checkpoint is written, and all promises of checkpoints hold."""

import pytest

from latte_flow.training.checkpoint.manifest import check_files, list_checkpoints
from tests.integration.launching import column
from tests.integration.test_resume import assert_same_metrics
from tests.integration.test_training import STEPS, assert_weights_equal

ASYNCHRONOUS = {"checkpoint__asynchronous": "true", "sample__every": 0}


def test_what_is_written_later_is_the_state_of_its_step(command, two_ranks):
    """Step 4's files are written after step 6 is trained, and hold step 4."""
    run = command.train(ranks=2, hooks=("write_after_later_steps",), **ASYNCHRONOUS)
    for step in (4, STEPS):
        assert not list(check_files(run.checkpoint(step)))
        assert_weights_equal(run, two_ranks, step)
    assert_same_metrics(run, two_ranks)


def test_a_run_killed_during_the_write_goes_on_from_the_checkpoint_before(command, two_ranks):
    died = command.train(
        ranks=2, checkpoint__every=2, hooks=("write_after_later_steps", "die_after_step"),
        variables={"DIE_AFTER_STEP": "5"}, code=9, **ASYNCHRONOUS,
    )  # fmt: skip
    assert [path.name for path in list_checkpoints(died.output_dir / "checkpoints")] == ["step_0000002"]
    resumed = command.train(ranks=2, output_dir=died.output_dir, **ASYNCHRONOUS)
    assert f"resumed from {died.checkpoint(2)}" in resumed.finished.output
    assert_same_metrics(resumed, two_ranks)
    assert_weights_equal(resumed, two_ranks, STEPS)
    assert not list((died.output_dir / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize(("step", "code"), [(4, 0), (STEPS, 2)])
def test_a_write_that_fails_costs_that_checkpoint_only(command, one_rank, step, code):
    run = command.train(
        checkpoint__every=2, hooks=("fail_a_write",), variables={"FAIL_WRITE": f"0 {step}"}, code=code, **ASYNCHRONOUS
    )
    assert f"checkpoint step_000000{step} NOT saved" in run.finished.output
    names = [path.name for path in list_checkpoints(run.output_dir / "checkpoints")]
    assert names == [f"step_000000{s}" for s in (2, 4, 6, 8) if s != step][-3:]
    if code == 0:
        assert column(run.output_dir, "failed_saves")[-1] == 1
        assert_weights_equal(run, one_rank, STEPS)
    else:
        assert f"error: output_dir: the checkpoint of step {STEPS}" in run.finished.output
