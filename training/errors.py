"""Errors a user can fix: a program that raises one exits with a one-line message instead of a traceback."""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from latte_flow.model.errors import ArgumentError


class UserError(ArgumentError):
    """An invalid configuration, a missing file, a checkpoint of another model. Names the field or file and what is accepted."""


@contextmanager
def naming(section: str) -> Iterator[None]:
    """Prefix the argument named by an error of model/ with its section of the configuration.

    ``path: x not found`` under ``naming("vlm")`` becomes the UserError ``vlm.path: x not found``.
    """
    try:
        yield
    except UserError:
        raise
    except ArgumentError as error:
        raise UserError(f"{section}.{error}") from error


DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (is killed by signal: [^.]*|exited unexpectedly)")
"""torch's message for a data worker that died."""
TRACEBACK = "LATTE_FLOW_TRACEBACK"
"""Environment variable: 1 prints the traceback of an error that is otherwise one line."""
FIRST_RANK_SECONDS = 30.0
"""How long the other ranks wait for rank 0 to report an error."""


def exit_code(program: Callable[[], None]) -> int:
    """Run a program; return 0, 2 after an error the user can fix, which is printed as one line, or 130 after Ctrl-C.

    Usually every rank hits the same error and rank 0 reports it. The other ranks wait first, because a launcher kills all ranks
    as soon as one fails, which could kill rank 0 before it prints. An error that rank 0 does not hit is reported by the rank
    that did. A killed data worker counts as such an error too. With LATTE_FLOW_TRACEBACK=1 the traceback is printed first.
    """
    try:
        program()
    except KeyboardInterrupt:  # a run that trains treats it as a stop request (monitor/preemption.py)
        print("interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except (UserError, RuntimeError) as error:
        line = _in_one_line(error)
        if line is None:
            raise
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exc()
        rank = int(os.environ.get("RANK", 0))
        if rank != 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the run's own handler would delay the exit
            time.sleep(FIRST_RANK_SECONDS)
        with tqdm.external_write_mode(file=sys.stderr):  # on its own line, not at the end of a progress bar
            print(f"error: {line}" if rank == 0 else f"error: rank {rank}: {line}", file=sys.stderr, flush=True)
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
    return None
