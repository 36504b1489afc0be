"""Errors a user can fix: a program that raises one exits with a one-line message instead of a traceback."""

import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from tqdm import tqdm

from latte_flow.model.errors import ArgumentError


class UserError(ArgumentError):
    """An invalid configuration, a missing file, a checkpoint of another model. Names the field or file and what is accepted."""


@contextmanager
def naming(section: str = "") -> Iterator[None]:
    """Turn an error of model/, which names an argument or a file and what is accepted, into a UserError.

    Args:
        section: prefixed to the argument: ``path: x not found`` under ``naming("vlm.")`` becomes ``vlm.path: x not found``.
    """
    try:
        yield
    except UserError:
        raise
    except ArgumentError as error:
        raise UserError(f"{section}{error}") from error


DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: [^.]*|exited unexpectedly)")
"""torch's message for a data worker that died."""
TRACEBACK = "LATTE_FLOW_TRACEBACK"
"""Environment variable: 1 prints the traceback of an error that is otherwise one line."""
REMEDIES = {
    errno.ENOENT: "a path that exists",
    errno.ENOTDIR: "a folder",
    errno.EEXIST: "a path where nothing is in the way",
    errno.EISDIR: "a file",
    errno.ENAMETOOLONG: "a shorter name",
    errno.EACCES: "a path that this user may read and write",
    errno.EPERM: "a path that this user may read and write",
    errno.EROFS: "a file system that may be written",
    errno.ENOSPC: "a disk with free space",
    errno.EDQUOT: "free space in the quota",
    errno.EFBIG: "a higher limit on the size of files (ulimit -f)",
    errno.EMFILE: "a higher limit on open files (ulimit -n)",
    errno.ENOMEM: "more memory",
}
"""What is accepted where the operating system reports an error."""
WRITE_FAILED = re.compile(r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed|serializing: I/O error")
"""What torch and safetensors say in place of an OSError."""
OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""torch's message for a MemoryError."""
FIRST_RANK_SECONDS = 30.0
"""How long the other ranks wait for rank 0 to report an error."""


def exit_code(program: Callable[[], None]) -> int:
    """Run a program; return 0, 2 after an error the user can fix, which is printed as one line, or 130 after Ctrl-C.

    Usually every rank hits the same error and rank 0 reports it. The other ranks wait first, because a launcher kills all ranks
    as soon as one fails, which could kill rank 0 before it prints. An error that rank 0 does not hit is reported by the rank
    that did. A killed data worker counts as such an error too, and so does what the operating system refuses: a file, or memory.
    With LATTE_FLOW_TRACEBACK=1 the traceback is printed first.
    """
    try:
        program()
    except KeyboardInterrupt:  # a run that trains treats it as a stop request (monitor/preemption.py)
        print("interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except (UserError, OSError, MemoryError, RuntimeError, SafetensorError) as error:
        line = _in_one_line(error)
        if line is None:
            raise
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        if rank.isdecimal() and rank != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the run's own handler would delay the exit
            time.sleep(FIRST_RANK_SECONDS)
        with tqdm.external_write_mode(file=sys.stderr):  # on its own line, not at the end of a progress bar
            print(f"error: {line}" if rank == "0" else f"error: rank {rank}: {line}", file=sys.stderr, flush=True)
        return 2
    return 0


def _in_one_line(error: Exception) -> str | None:
    """Return the message for the user, or None for an error the user cannot fix."""
    text = str(error)
    if isinstance(error, UserError):
        if "Original Traceback" in text:  # torch wraps a data worker's error in a traceback
            text = text.rsplit(f"{UserError.__name__}: ", 1)[-1]
        return " ".join(text.splitlines())  # quoted messages of other libraries may span several lines
    if dead := DEAD_WORKER.search(f"{error.__cause__} {text}"):  # the cause names the signal
        return (
            f"data.num_workers: a data worker {dead[1]}; either memory ran out (accepted: fewer workers) or a file of "
            "data.path is truncated or unreadable; the same command resumes from the last checkpoint"
        )
    if isinstance(error, OSError) and (error.filename is not None or error.errno in REMEDIES):
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        accepted = REMEDIES.get(error.errno or 0, "another path")
        return f"{names or 'a file'}: {error.strerror}; accepted: {accepted}"
    if WRITE_FAILED.search(text):
        return f"a file could not be written ({' '.join(text.split())}); accepted: free space, and files of any size (ulimit -f)"
    if isinstance(error, MemoryError) or OUT_OF_MEMORY in text:
        return f"memory ran out ({text or type(error).__name__}); accepted: more memory, or smaller sizes"
    return None
