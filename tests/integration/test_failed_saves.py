"""A checkpoint that cannot be written costs nothing but itself; one that is not what it seems is not executed."""

import hashlib
import json
import os
import shutil
import subprocess

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latte_flow.training.checkpoint.manifest import list_checkpoints, manifest_digest
from tests.integration.launching import column, metrics
from tests.integration.test_resume import assert_same_metrics
from tests.integration.test_training import STEPS, assert_weights_equal


def steps(run) -> list[str]:
    """The folders of steps, also those that are no checkpoint."""
    return sorted(path.name for path in (run.output_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_fails_on_one_rank_is_counted_and_training_goes_on(command, two_ranks, rank):
    run = command.train(
        ranks=2, checkpoint__every=2, sample__every=0, hooks=("fail_a_write",), variables={"FAIL_WRITE": f"{rank} 4"}
    )
    assert "checkpoint step_0000004 NOT saved" in run.finished.output
    assert "No space left on device" in run.finished.output
    assert column(run.output_dir, "failed_saves") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert steps(run) == ["step_0000002", "step_0000006", "step_0000008"]
    assert_same_metrics(run, two_ranks)
    assert_weights_equal(run, two_ranks, STEPS)


def test_a_failed_last_save_is_an_error_and_the_same_command_goes_on(command, one_rank):
    failed = command.train(sample__every=0, hooks=("fail_a_write",), variables={"FAIL_WRITE": "0 8"}, code=2)
    assert "error: output_dir: the checkpoint of step 8" in failed.finished.output
    assert (failed.output_dir / "checkpoints" / "latest").read_text() == "step_0000004"
    again = command.train(sample__every=0, output_dir=failed.output_dir)
    assert "resumed from" in again.finished.output
    assert_same_metrics(again, one_rank)
    assert_weights_equal(again, one_rank, STEPS)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, less than two checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]).returncode == 0
    )
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_ends_neither_the_run_nor_the_checkpoint_that_fits(
    command, small_disk, tmp_path, one_rank
):
    output = tmp_path / "run"
    output.mkdir()
    (output / "stop").touch()  # what may lie in a new run's folder; it also stops the run after its first step
    command.train(output_dir=output, sample__every=0, code=75)
    whole = sum(file.stat().st_size for file in list_checkpoints(output / "checkpoints")[0].iterdir())
    assert whole < 4 * 2**20 < 2 * whole
    for checkpoint in list_checkpoints(output / "checkpoints"):
        subprocess.run(["cp", "-r", checkpoint, small_disk], check=True)
    subprocess.run(["rm", "-r", output / "checkpoints"], check=True)
    (output / "checkpoints").symlink_to(small_disk)
    run = command.train(output_dir=output, sample__every=0, checkpoint__every=4, code=2)
    assert "resumed from" in run.finished.output
    assert "checkpoint step_0000004 NOT saved: it needs 0.00" in run.finished.output
    assert "GiB free; earlier ones are untouched, training continues" in run.finished.output
    assert "error: output_dir: the checkpoint of step 8" in run.finished.output
    assert [path.name for path in list_checkpoints(output / "checkpoints")] == ["step_0000001"]
    assert column(output, "loss") == column(one_rank.output_dir, "loss")
    assert metrics(output)[-1]["failed_saves"] == 1


def test_logs_that_cannot_be_written_are_counted_and_training_goes_on(command, small_disk, tmp_path, one_rank):
    output, elsewhere = small_disk / "run", tmp_path / "checkpoints"
    shutil.copytree(one_rank.output_dir, output, ignore=shutil.ignore_patterns("checkpoints", "samples"))
    shutil.copytree(one_rank.checkpoint(4), elsewhere / "step_0000004")
    (output / "checkpoints").symlink_to(elsewhere)
    run = command.train(
        output_dir=output, sample__every=1, hooks=("break_logs",), variables={"BREAK_LOGS": f"5 7 {small_disk}"}
    )
    assert "resumed from" in run.finished.output
    for kind in ("TensorBoard", "a sample grid", "standard output"):
        assert run.finished.output.count(f"{kind} could not be written: [Errno 28]") == 1
    drawn = sorted(path.name for path in (output / "samples").iterdir())
    assert drawn == ["step_0000007.png", "step_0000008.png"]
    logged = metrics(output)
    assert [entry["failed_logs"] for entry in logged if entry["step"] <= 4] == [0, 0, 0, 0]
    assert logged[-1]["failed_logs"] >= 4  # two grids and what TensorBoard would have got
    losses = {entry["step"]: entry["loss"] for entry in metrics(one_rank.output_dir)}
    assert [entry["loss"] for entry in logged] == [losses[entry["step"]] for entry in logged]
    assert {1, 2, 3, 4, 7, 8} <= {entry["step"] for entry in logged}
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 7, 8]
    assert_weights_equal(run, one_rank, STEPS)


class Executes:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['CANARY']}",)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_code_in_a_checkpoint_is_not_executed(command, tmp_path, monkeypatch, file):
    monkeypatch.setenv("CANARY", str(tmp_path / "executed"))
    run = command.train(max_steps=2, sample__every=0, checkpoint__every=2)
    path, manifest = run.checkpoint(2) / file, run.checkpoint(2) / "manifest.json"
    content = torch.load(path, weights_only=False)
    torch.save(content | {"surprise": Executes()}, path)
    entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    listed = json.loads(manifest.read_text())
    listed["files"][file] = entry
    manifest.write_text(json.dumps(listed | {"sha256": manifest_digest(listed)}))

    resumed = command.train(max_steps=3, sample__every=0, checkpoint__every=3, output_dir=run.output_dir, code=2)
    drawn = command.sample(run.output_dir, code=2)
    for finished in (resumed.finished, drawn.finished):
        assert f"error: {run.checkpoint(2)}: holds an object that is not " in finished.output
        assert "Traceback" not in finished.output
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()  # the trap was one
