"""Errors that a user can mend: they end a program with one line instead of a traceback."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


class UserError(ValueError):
    """A wrong configuration, a missing file, a checkpoint of another model. The message names the field or file and what fits."""


@contextmanager
def naming(section: str) -> Iterator[None]:
    """Put a section of the configuration before the argument that an error of model/ names.

    ``path: x not found`` under ``naming("vlm")`` becomes the UserError ``vlm.path: x not found``.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{section}.{error}") from error


DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: [^.]*|exited unexpectedly)")
"""How torch says that a process that prepares batches is gone."""
FIRST_RANK_SECONDS = 30.0
"""How long the other ranks of a launch leave an error to the first one."""


def exit_code(program: Callable[[], None]) -> int:
    """Run a program; return 0, or 2 after an error that the user can mend, said in one line.

    Mostly every rank of a launch finds the same error, and the first one says it. The others wait, because a launcher ends all
    ranks as soon as one has failed, and would end the first one before it has spoken; an error that the first rank does not find
    is said by the rank that did. A data worker that was killed is such an error too.
    """
    try:
        program()
    except (UserError, RuntimeError) as error:
        line = _in_one_line(error)
        if line is None:
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank != 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run's own handler would put off the end
            time.sleep(FIRST_RANK_SECONDS)
        with tqdm.external_write_mode(file=sys.stderr):  # on a line of its own, not at the end of a progress bar
            print(f"error: {line}" if rank == 0 else f"error: rank {rank}: {line}", file=sys.stderr, flush=True)
        return 2
    return 0


def _in_one_line(error: Exception) -> str | None:
    """Return what to tell the user; None for an error that is ours to mend."""
    text = str(error)
    if isinstance(error, UserError):
        if "Original Traceback" in text:  # torch wraps an error of a data worker in its traceback
            text = text.rsplit(f"{UserError.__name__}: ", 1)[-1]
        return " ".join(text.splitlines())  # other libraries' messages, which some of ours quote, may have many
    if dead := DEAD_WORKER.search(f"{error.__cause__} {text}"):  # the cause knows the signal
        return (
            f"data.num_workers: a data worker {dead[1]}; either the memory is full (accepted: fewer workers) or a file of "
            "data.path was cut off or could not be read; the same command goes on from the last checkpoint"
        )
    return None
