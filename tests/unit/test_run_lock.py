"""The lock of an output_dir: one holder, whatever becomes of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latte_flow.training import run_lock
from latte_flow.training.errors import UserError
from latte_flow.training.run_lock import LOCK_FILE, RunLock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, torch.distributed as dist
from pathlib import Path
from latte_flow.training.run_lock import RunLock
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    monkeypatch.setattr(run_lock, "agree", lambda value: value)
    monkeypatch.setattr(run_lock, "is_first_rank", lambda: True)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path, holder):
    with pytest.raises(
        UserError, match=rf"output_dir: .*run is in use by process {holder.pid} on {os.uname().nodename}"
    ):
        RunLock(tmp_path / "run")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = RunLock(tmp_path / "run")
    assert f'"pid": {os.getpid()}' in (tmp_path / "run" / LOCK_FILE).read_text()
    lock.release()


def test_the_holder_names_its_slurm_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    lock = RunLock(tmp_path)
    assert ", SLURM job 4711" in run_lock._describe((tmp_path / LOCK_FILE).read_text())
    lock.release()


def test_a_run_that_was_refused_leaves_no_folder_of_its_own(tmp_path):
    RunLock(tmp_path / "a" / "b").release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    RunLock(tmp_path / "mine" / "run").release()
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    RunLock(tmp_path).release()
    assert "without locks (No locks available)" in capsys.readouterr().err


def test_an_output_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: .*cannot be written: .*; accepted: a writable folder"):
        RunLock(tmp_path / "file" / "run")
