"""A lock that lets only one run at a time write an output_dir. Rank 0 holds it for the lifetime of the run.

It is a kernel lock (fcntl), released when its process ends for any reason: a killed run or a requeued job leaves nothing to
clean up. On a shared file system the file server enforces it across nodes, if the file system supports locks.
"""

import errno
import fcntl
import json
import os
import sys
from contextlib import suppress
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
        self._folder: int | None = None
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
        self._folder = os.open(
            self.file.parent, os.O_RDONLY | os.O_DIRECTORY
        )  # open: its inode is not given to another
        return None

    def folder_is_there(self) -> bool:
        """Return whether the output_dir has not been renamed, removed or replaced. True on ranks that do not hold the lock."""
        try:
            return self._folder is None or os.path.samestat(os.fstat(self._folder), self.file.parent.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a file system that does not answer now
            return True

    def release(self) -> None:
        """Release the lock; remove its file and the folders created only for it. Not collective."""
        if self._stream is None:
            return
        assert self._folder is not None, "opened with the lock"
        with suppress(FileNotFoundError):  # while locked: a process that has the file open then notices that it is gone
            os.unlink(LOCK_FILE, dir_fd=self._folder)
        for folder in self._made if self.folder_is_there() else ():
            if any(folder.iterdir()):
                break
            folder.rmdir()
        self._stream.close()
        os.close(self._folder)
        self._stream = self._folder = None


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
