"""One run writes an output_dir at a time: a lock that rank 0 holds for the run's life.

The lock is the kernel's (fcntl), so it ends with its process, however that ends: a killed run or a requeued job leaves nothing
to clean up. On a shared file system the file server keeps it for all nodes, if the system supports locks.
"""

import errno
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import TextIO

from latte_flow.training.distributed.collectives import agree, is_first_rank
from latte_flow.training.errors import UserError

LOCK_FILE = "run.lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of a file system that has no locks."""


class RunLock:
    """The lock of an output_dir. Taking it is collective; rank 0 holds it until ``release`` or the end of its process.

    Nothing else of the process may open the file: POSIX drops a process's locks on a file with the first descriptor closed.

    Args:
        output_dir: made if it is not there.

    Raises:
        UserError: on every rank, when another process holds the lock, or the folder cannot be written; names the host and
            process that hold it.
    """

    def __init__(self, output_dir: Path):
        self.file = output_dir / LOCK_FILE
        self._stream: TextIO | None = None
        self._made: list[Path] = []
        problem = agree(self._take() if is_first_rank() else None)
        if problem is not None:
            raise UserError(f"output_dir: {problem}")

    def _take(self) -> str | None:
        """Take the lock; return why that is not possible."""
        folder = self.file.parent
        try:
            while not folder.exists():
                self._made.append(folder)
                folder = folder.parent
            self.file.parent.mkdir(parents=True, exist_ok=True)
            stream = self.file.open("a+", encoding="utf-8")
        except OSError as error:
            return f"{self.file.parent} cannot be written: {error.strerror}; accepted: a folder that can be"
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                stream.seek(0)
                holder = _describe(stream.read())
                stream.close()
                return (
                    f"{self.file.parent} is in use by {holder}; accepted: another output_dir, or the same one when that run has "
                    "ended"
                )
            print(
                f"output_dir: {self.file.parent} is on a file system without locks ({error.strerror}): a second run that is "
                "started there will not be refused",
                file=sys.stderr,
                flush=True,
            )
        if not _is_same(stream, self.file):  # a run that was refused has just removed it
            stream.close()
            return self._take()
        stream.truncate(0)
        mine = {"host": os.uname().nodename, "pid": os.getpid(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
        stream.write(json.dumps(mine) + "\n")
        stream.flush()
        self._stream = stream
        return None

    def release(self) -> None:
        """Give the lock back, and remove its file and the folders that were made for it alone. Not collective."""
        if self._stream is None:
            return
        self.file.unlink(missing_ok=True)  # while it is held: who opens it now finds out that it is not the one there
        for folder in self._made:
            if any(folder.iterdir()):
                break
            folder.rmdir()
        self._stream.close()
        self._stream = None


def _is_same(stream: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _describe(content: str) -> str:
    try:
        holder = json.loads(content)
        job = f", SLURM job {holder['slurm_job']}" if holder["slurm_job"] else ""
        return f"process {holder['pid']} on {holder['host']}{job}"
    except (ValueError, KeyError, TypeError):  # it has just been taken, and nothing is written yet
        return "another process"
