"""A lock that lets only one run at a time write an output_dir. Rank 0 holds it for the lifetime of the run.

It is a kernel lock (fcntl), released when its process ends for any reason: a killed run or a requeued job leaves nothing to
clean up. On a shared file system the file server enforces it across nodes, if the file system supports locks.
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
"""Errors of a file system without lock support."""


class RunLock:
    """The lock of an output_dir. Taking it is collective; rank 0 holds it until ``release`` or the end of its process.

    Nothing else in the process may open the file: POSIX drops a process's locks on a file when any descriptor to it is closed.

    Args:
        output_dir: created if missing.

    Raises:
        UserError: on every rank, when another process holds the lock (named by host and process id) or the folder cannot be
            written.
    """

    def __init__(self, output_dir: Path):
        self.file = output_dir / LOCK_FILE
        self._stream: TextIO | None = None
        self._made: list[Path] = []
        problem = agree(self._take() if is_first_rank() else None)
        if problem is not None:
            raise UserError(f"output_dir: {problem}")

    def _take(self) -> str | None:
        """Take the lock. Return the reason it failed, or None."""
        folder = self.file.parent
        try:
            while not folder.exists():
                self._made.append(folder)
                folder = folder.parent
            self.file.parent.mkdir(parents=True, exist_ok=True)
            stream = self.file.open("a+", encoding="utf-8")
        except OSError as error:
            return f"{self.file.parent} cannot be written: {error.strerror}; accepted: a writable folder"
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                stream.seek(0)
                holder = _describe(stream.read())
                stream.close()
                return (
                    f"{self.file.parent} is in use by {holder}; accepted: another output_dir, or the same one after that run "
                    "has ended"
                )
            print(
                f"output_dir: {self.file.parent} is on a file system without locks ({error.strerror}): a second run "
                "started there will not be refused",
                file=sys.stderr,
                flush=True,
            )
        if not _is_same(stream, self.file):  # the previous holder removed the file in the meantime
            stream.close()
            return self._take()
        stream.truncate(0)
        mine = {"host": os.uname().nodename, "pid": os.getpid(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
        stream.write(json.dumps(mine) + "\n")
        stream.flush()
        self._stream = stream
        return None

    def release(self) -> None:
        """Release the lock; remove its file and the folders created only for it. Not collective."""
        if self._stream is None:
            return
        self.file.unlink(missing_ok=True)  # while locked: a process that has it open then notices that it is gone
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
    except (ValueError, KeyError, TypeError):  # the lock was just taken and nothing is written yet
        return "another process"
