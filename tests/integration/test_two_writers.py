"""Two runs on one output_dir: one of them trains, the other is refused in one line."""

import time

from latte_flow.training.checkpoint.manifest import list_checkpoints, read_manifest
from latte_flow.training.run_lock import LOCK_FILE
from tests.integration.launching import column


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
    command.train(
        output_dir=output, sample__every=0, max_steps=4
    )  # already trained further: nothing is lost or written
    assert len(list_checkpoints(output / "checkpoints")) == left
