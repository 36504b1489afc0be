"""Two runs on one output_dir: one of them trains, the other is refused in one line."""

import shutil
import signal
import subprocess
import time

from latte_flow.training.checkpoint.manifest import list_checkpoints, read_manifest
from latte_flow.training.run_lock import LOCK_FILE
from tests.integration.launching import ROOT, column, environment, free_port

LONG = {"max_steps": 50, "checkpoint.every": 10, "sample.every": 0}
"""Long enough to be killed in the middle."""


def test_two_seeds_started_at_once(command, tmp_path):
    output = tmp_path / "run"
    runs = [command.start(output, checkpoint__every=1, sample__every=0, seed=seed) for seed in (1, 2)]
    ended = [run.wait() for run in runs]
    assert sorted(finished.code for finished in ended) == [0, 2], [finished.output for finished in ended]
    refused = next(finished.output for finished in ended if finished.code == 2)
    (line,) = [line for line in refused.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: output_dir: {output} is in use by process ")
    winner = next(seed for seed, finished in zip((1, 2), ended, strict=True) if finished.code == 0)
    alone = command.train(checkpoint__every=1, sample__every=0, seed=winner)
    assert column(output, "loss") == column(alone.output_dir, "loss")
    assert [read_manifest(path)["step"] for path in list_checkpoints(output / "checkpoints")] == [6, 7, 8]
    assert not (output / LOCK_FILE).exists()


def test_a_second_start_is_refused_until_the_first_is_killed(command, tmp_path):
    output = tmp_path / "run"
    first = command.start(output, max_steps=4000, sample__every=0, ranks=2)
    while not list_checkpoints(output / "checkpoints"):
        assert all(process.is_alive() for process in first.processes), first.log.read_text()
        time.sleep(0.1)
    refused = command.train(output_dir=output, sample__every=0, max_steps=4000, code=2, ranks=2)
    assert f"is in use by process {first.processes[0].pid} on " in refused.finished.output
    for process in first.processes:
        process.kill()
        process.join()
    left = len(list_checkpoints(output / "checkpoints"))
    assert left > 0
    # Already trained further: nothing is lost or written.
    command.train(output_dir=output, sample__every=0, max_steps=4)
    assert len(list_checkpoints(output / "checkpoints")) == left


def test_the_runner_alone_is_killed_and_the_same_command_started_at_once(command, tmp_path):
    """``deepspeed`` leaves its ranks alive. They stop with a checkpoint; until then the same command is refused.

    Whatever ends a launcher looks the same to its ranks (tests/unit/test_launcher.py has the other signals).
    """
    fields = {name.replace(".", "__"): value for name, value in LONG.items()}
    uninterrupted = command.train(ranks=2, **fields)
    output = tmp_path / "run"
    arguments = command.training(output, LONG)
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "training/main.py", *arguments]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        runner = subprocess.Popen(
            launch, cwd=ROOT, env=environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    while not list_checkpoints(output / "checkpoints"):
        assert runner.poll() is None, log.read_text()
        time.sleep(0.05)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    again = [command.train(output_dir=output, ranks=2, code=None, **fields).finished]
    while again[-1].code != 0:
        assert f"error: output_dir: {output} is in use by process " in again[-1].output
        assert len(again) < 10
        again.append(command.train(output_dir=output, ranks=2, code=None, **fields).finished)
    assert "the launcher of this rank has ended: stopping after this step" in log.read_text()
    assert "resumed from" in again[-1].output
    assert column(output, "step") == column(uninterrupted.output_dir, "step")
    assert column(output, "loss") == column(uninterrupted.output_dir, "loss")


def test_checkpoints_of_another_run_or_step_are_refused_and_stay(command, tmp_path):
    fields = {"checkpoint__every": 4, "sample__every": 0}
    ours = command.train(**fields)
    other = command.train(**fields, seed=5)
    folder = ours.output_dir / "checkpoints"
    our_id, other_id = (read_manifest(run.checkpoint(8))["run_id"] for run in (ours, other))
    assert our_id != other_id
    assert our_id in (ours.output_dir / "config.yaml").read_text()

    copied = folder / "step_0000012"
    for source, message in (
        (other.checkpoint(8), "is the checkpoint of step 8; accepted: its name, step_0000008, or another place"),
        (ours.checkpoint(8), "is the checkpoint of step 8; accepted: its name, step_0000008, or another place"),
    ):
        shutil.copytree(source, copied)
        refused = command.train(output_dir=ours.output_dir, **fields, max_steps=16, code=2)
        assert f"error: {copied}: {message}" in refused.finished.output
        assert copied.is_dir()
        shutil.rmtree(copied)

    shutil.rmtree(ours.checkpoint(8))
    shutil.copytree(other.checkpoint(8), ours.checkpoint(8))
    refused = command.train(output_dir=ours.output_dir, **fields, max_steps=16, code=2)
    assert f"{ours.checkpoint(8)}: is a checkpoint of another run ({other_id}; this one is {our_id})" in (
        refused.finished.output
    )
    shutil.rmtree(ours.checkpoint(8))
    # Named, it is what a new run starts from; it then has an id of its own.
    forked = command.train(**fields, resume=other.checkpoint(8), max_steps=12, seed=5)
    assert read_manifest(forked.checkpoint(12))["run_id"] not in (our_id, other_id)
    again = command.train(output_dir=ours.output_dir, **fields, max_steps=12)
    assert read_manifest(again.checkpoint(12))["run_id"] == our_id
