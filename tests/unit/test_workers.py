"""Data workers ignore the stop signals, and still end with their process."""

import subprocess
import sys
from pathlib import Path

import pytest

FAILING = """
import os, signal
from torch.utils.data import DataLoader
from latte_flow.training.data.workers import ignore_stop_signals, kill_workers_at_exit

kill_workers_at_exit()
batches = iter(DataLoader(range(100), num_workers=1, worker_init_fn=ignore_stop_signals, persistent_workers=True))
next(batches)
(worker,) = batches._workers
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    os.kill(worker.pid, number)
assert [int(next(batches)) for _ in range(50)] == list(range(1, 51))
print("workers survived", flush=True)
raise RuntimeError("the run fails while its workers live")
"""


@pytest.mark.slow
def test_workers_survive_the_signals_and_a_failing_process_does_not_wait_for_them():
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", FAILING], cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "workers survived\n"
    assert ended.stderr.endswith("RuntimeError: the run fails while its workers live\n")
    assert ended.returncode == 1
