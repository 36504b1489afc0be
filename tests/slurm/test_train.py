"""sbatch launch/train_h200.sh on a real SLURM: two nodes, stopping by signal, requeueing, resuming."""

import json
import time
from pathlib import Path

import pytest

from latte_flow.training.monitor.preemption import REQUEUE_FILE, STOP_FILE
from latte_flow.training.run_lock import LOCK_FILE
from tests.integration.launching import listening, server_environment, start_ranks

STEPS = 70
SMALL = (
    *("--global_batch_size", "32", "--max_steps", str(STEPS), "--logging.every", "1", "--sample.every", "0"),
    *("--vlm.tiny.hidden_size", "32", "--vlm.tiny.intermediate_size", "64"),
)
TIMEOUT = 200


def losses(output_dir: Path) -> dict[int, float]:
    """Return step -> loss of what has been logged; a line that is being written does not count."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in rows}


def wait_for_step(cluster, job: str, output_dir: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while max(losses(output_dir), default=0) < step:
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), cluster.job(job)["JobState"]
        assert time.monotonic() < deadline, f"step {step} not reached: {losses(output_dir)}"
        time.sleep(0.1)


def everything_logged(folder: Path) -> str:
    return "\n".join(f"== {path}\n{path.read_text()}" for path in [folder / "job.log", *folder.glob("logs/*/*/*.log")])


@pytest.fixture
def reference(tmp_path) -> dict[int, float]:
    """The losses of two ranks without SLURM that nothing interrupts."""
    with server_environment():
        arguments = ["--config", "training/configs/digits.yaml", *SMALL, "--output_dir", str(tmp_path / "reference")]
        finished = start_ranks("training/main.py", arguments, tmp_path / "reference.log", ranks=2).wait()
    assert finished.code == 0, finished.output
    return losses(tmp_path / "reference")


def test_signalled_run_requeues_itself_and_continues_as_if_nothing_had_happened(cluster, submit, tmp_path, reference):
    run = tmp_path / "run"
    job = submit("train_h200.sh", "training/configs/digits.yaml", *SMALL, "--output_dir", str(run))

    # As SLURM does before the time limit: a signal to the batch script.
    wait_for_step(cluster, job, run, 4)
    first_rank = json.loads((run / LOCK_FILE).read_text())["pid"]
    assert {address for address, _ in listening(Path(f"/proc/{first_rank}"))} == {"127.0.0.1"}
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_step(cluster, job, run, 1 + stopped_at(cluster, job, run, 1, tmp_path))
    # A signal to every process of the job's step: ranks, launchers, data workers.
    cluster.run("scancel", "--signal=USR1", job)
    stopped_at(cluster, job, run, 2, tmp_path)

    assert cluster.wait_for_end(job, TIMEOUT) == "COMPLETED", everything_logged(tmp_path)
    assert cluster.job(job)["Restarts"] == "2"
    assert sorted(path.name for path in (tmp_path / "logs" / job).iterdir()) == ["restart-0", "restart-1", "restart-2"]
    assert len(list(tmp_path.glob("logs/*/restart-0/node-?.log"))) == 2
    assert list(reference) == list(range(1, STEPS + 1))
    assert losses(run) == reference
    assert not (run / STOP_FILE).exists()
    assert not (run / REQUEUE_FILE).exists()


def stopped_at(cluster, job: str, run: Path, restarts: int, folder: Path) -> int:
    """Wait until the job has been requeued; return the step of its newest checkpoint, in the middle of the run."""
    deadline = time.monotonic() + TIMEOUT
    while cluster.job(job)["Restarts"] != str(restarts):
        assert cluster.job(job)["JobState"] in ("RUNNING", "COMPLETING", "PENDING"), everything_logged(folder)
        assert time.monotonic() < deadline, everything_logged(folder)
        time.sleep(0.2)
    latest = (run / "checkpoints" / "latest").read_text()
    step = json.loads((run / "checkpoints" / latest / "manifest.json").read_text())["step"]
    assert 1 <= step < STEPS
    return step
