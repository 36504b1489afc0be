"""A run that was stopped, in any way, is continued by the same command as if it had never stopped: bit for bit."""

import json
import shutil
import signal
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latte_flow.training.checkpoint.manifest import list_checkpoints
from tests.integration.launching import column, metrics
from tests.integration.test_training import STEPS, assert_weights_equal, recorded

REPRODUCIBLE = ("step", "loss", "loss_group_0", "loss_group_3", "grad_norm", "grad_norm_group_1", "lr", "samples")


def assert_same_metrics(run, reference) -> None:
    """Every logged step is there exactly once, with the same bits."""
    for name in REPRODUCIBLE:
        assert column(run.output_dir, name) == column(reference.output_dir, name), name
    timestep_bins = [{k: v for k, v in e.items() if k.startswith("loss_tau")} for e in metrics(reference.output_dir)]
    assert timestep_bins == [{k: v for k, v in e.items() if k.startswith("loss_tau")} for e in metrics(run.output_dir)]


@pytest.fixture(scope="module")
def logged_every_third(command):
    """The uninterrupted run on two ranks, logged every three steps: the mean of steps 4 to 6 spans a stop at step 4."""
    return command.train(ranks=2, logging__every=3)


def test_a_run_that_died_between_two_logged_steps_continues_with_the_same_bits(command, logged_every_third):
    died = command.train(
        ranks=2, logging__every=3, hooks=("die_after_step",), variables={"DIE_AFTER_STEP": "5"}, code=9
    )
    assert column(died.output_dir, "step") == [3]
    resumed = command.train(ranks=2, logging__every=3, output_dir=died.output_dir)
    assert "resumed from" in resumed.finished.output
    assert column(resumed.output_dir, "step") == [3, 6, 8]
    assert_same_metrics(resumed, logged_every_third)
    assert_weights_equal(resumed, logged_every_third, STEPS)


def test_a_launch_killed_at_any_moment_continues_with_the_same_bits(command, logged_every_third, tmp_path):
    """All ranks are killed once the checkpoint of step 4 is there: in a step, a log, a grid or a save."""
    output_dir = tmp_path / "run"
    manifest = output_dir / "checkpoints" / "step_0000004" / "manifest.json"
    launch = command.start(output_dir, ranks=2, logging__every=3)
    while not manifest.exists():
        assert all(process.is_alive() for process in launch.processes), launch.log.read_text()
        time.sleep(0.001)
    for process in launch.processes:
        process.kill()
    assert launch.wait().code == -signal.SIGKILL
    resumed = command.train(ranks=2, logging__every=3, output_dir=output_dir)
    assert f"resumed from {manifest.parent}" in resumed.finished.output
    assert_same_metrics(resumed, logged_every_third)
    assert_weights_equal(resumed, logged_every_third, STEPS)
    assert not list((output_dir / "checkpoints").glob("*.partial"))


def test_steps_beyond_the_last_checkpoint_are_trained_again_and_reported_once(command, one_rank):
    died = command.train(hooks=("die_after_step", "record_batches"), variables={"DIE_AFTER_STEP": "7"}, code=9)
    assert column(died.output_dir, "step") == [1, 2, 3, 4, 5, 6]
    resumed = command.train(output_dir=died.output_dir, hooks=("record_batches",))
    assert column(resumed.output_dir, "step") == list(range(1, STEPS + 1))
    assert_same_metrics(resumed, one_rank)
    assert_weights_equal(resumed, one_rank, STEPS)
    # The samples after the stop, too, are those of the uninterrupted run, with the same losses to the last bit.
    whole, again = recorded(one_rank), recorded(resumed)
    assert sorted(again) == sorted(key for key in whole if key[0] > 4)
    for key, row in again.items():
        assert all(torch.equal(row[name], whole[key][name]) for name in row), key
    events = EventAccumulator(str(resumed.output_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_more_steps_than_before_continue_as_one_longer_run(command, one_rank):
    shorter = command.train(max_steps=4, sample__every=0)
    longer = command.train(max_steps=STEPS, sample__every=0, output_dir=shorter.output_dir)
    assert_same_metrics(longer, one_rank)
    assert_weights_equal(longer, one_rank, STEPS)


def test_a_run_that_is_done_stays_as_it_is(command, one_rank):
    before = {path: path.read_bytes() for path in list_checkpoints(one_rank.output_dir / "checkpoints")[-1].iterdir()}
    logged = metrics(one_rank.output_dir)
    again = command.train(output_dir=one_rank.output_dir)
    assert "already trained to step 8" in again.finished.output
    assert metrics(one_rank.output_dir) == logged
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_damaged_newest_checkpoint_is_skipped_and_its_steps_are_trained_again(command, one_rank):
    run = command.train(sample__every=0)
    shard = next(run.checkpoint(STEPS).glob("*_optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    again = command.train(sample__every=0, output_dir=run.output_dir)
    assert f"{shard.name} has another SHA-256" in again.finished.output
    assert f"resumed from {run.checkpoint(4)}" in again.finished.output
    assert_same_metrics(again, one_rank)
    assert_weights_equal(again, one_rank, STEPS)


def test_a_run_that_died_while_it_was_starting_is_started_by_the_same_command(command, one_rank):
    died = command.train(hooks=("die_while_starting",), code=9)
    assert (died.output_dir / "model").exists()
    started = command.train(output_dir=died.output_dir)
    assert_same_metrics(started, one_rank)


def test_the_interval_that_spans_a_stop_is_the_mean_of_its_steps(logged_every_third, two_ranks):
    """The logged means are those of single steps, so the comparisons above compare what they should."""
    single = column(two_ranks.output_dir, "loss")
    expected = [sum(single[:3]) / 3, sum(single[3:6]) / 3, sum(single[6:]) / 2]
    assert column(logged_every_third.output_dir, "loss") == pytest.approx(expected, rel=1e-12)
    assert json.loads((logged_every_third.checkpoint(4) / "manifest.json").read_text())["world_size"] == 2


def test_a_new_run_starts_from_another_runs_checkpoint_and_then_has_its_own(command, one_rank, tmp_path):
    output, named = tmp_path / "run", one_rank.checkpoint(4)
    fields = {"output_dir": output, "resume": named, "sample__every": 0}
    before = {path: path.read_bytes() for path in one_rank.output_dir.rglob("*") if path.is_file()}
    run = command.train(max_steps=6, **fields)
    assert f"a new run from {named}" in run.finished.output
    assert column(output, "step") == [5, 6]
    again = command.train(**fields)  # as a requeued job: it resumes from its own newest checkpoint
    assert f"resumed from {run.checkpoint(6)}" in again.finished.output
    assert column(output, "loss") == column(one_rank.output_dir, "loss")[4:]
    assert_weights_equal(again, one_rank, STEPS)
    assert {path: path.read_bytes() for path in one_rank.output_dir.rglob("*") if path.is_file()} == before

    other = command.train(output_dir=tmp_path / "other", resume=named, sample__every=0, optimizer__lr=0.1)
    assert "optimizer.lr: the run has 0.002, this command 0.1" in other.finished.output
    assert column(other.output_dir, "loss")[:1] == column(one_rank.output_dir, "loss")[4:5]
    assert column(other.output_dir, "loss")[1] != column(one_rank.output_dir, "loss")[5]


def test_a_named_checkpoint_that_is_damaged_is_refused(command, one_rank, tmp_path):
    copy = shutil.copytree(one_rank.output_dir, tmp_path / "copy")
    shard = next((copy / "checkpoints" / "step_0000004").glob("*_optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    run = command.train(output_dir=tmp_path / "run", resume=shard.parent, code=2)
    assert f"{shard.name} has {shard.stat().st_size} bytes instead of" in run.finished.output
    assert "checkpoints are damaged" in run.finished.output


def test_checkpoints_on_another_disk_and_a_step_that_is_a_link(command, one_rank, tmp_path):
    """Both are links; training, retention, sampling, conversion and a new run from there take them for folders."""
    output, elsewhere, archive = (tmp_path / name for name in ("run", "elsewhere", "archive"))
    shutil.copytree(one_rank.output_dir, output, ignore=shutil.ignore_patterns("step_0000008"))
    (output / "checkpoints").rename(elsewhere)
    (elsewhere / "step_0000004").rename(archive)
    (output / "checkpoints").symlink_to(elsewhere)
    (elsewhere / "step_0000004").symlink_to(archive)
    resumed = command.train(output_dir=output, checkpoint__keep_last=1)
    assert f"resumed from {output}/checkpoints/step_0000004" in resumed.finished.output
    assert_same_metrics(resumed, one_rank)
    assert_weights_equal(resumed, one_rank, STEPS)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["latest", "step_0000008"]
    assert (archive / "manifest.json").is_file()
    command.sample(output, "--classes", "1")
    command.tool("tools/convert_checkpoint.py", str(output), str(tmp_path / "converted"), "--to", "safetensors")
    assert (tmp_path / "converted" / "config.json").is_file()
    another = command.train(resume=output / "checkpoints" / "step_0000008", max_steps=9, sample__every=0)
    assert f"a new run from {output}/checkpoints/step_0000008" in another.finished.output
