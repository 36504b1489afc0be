"""Logs never end a run: what cannot be written is skipped, counted, and reported once per kind of log.

Only errors of the operating system count (a full disk, a closed pipe, a terminal that is gone); others are raised.
"""

import itertools
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TextIO, cast

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_failed: Counter[str] = Counter()


def failed_logs() -> int:
    """Return the number of failed writes since the start of the process."""
    return _failed.total()


@contextmanager
def skip_failures(kind: str) -> Iterator[None]:
    """Skip the rest of the body when it raises OSError, count the failure and report the first one of its kind.

    Args:
        kind: what the body writes, as the report names it.
    """
    try:
        yield
    except OSError as error:
        _failed[kind] += 1
        if _failed[kind] == 1:
            print(
                f"{kind} could not be written: {error}; such failures are counted (failed_logs in metrics.jsonl) and not "
                "reported again, training continues",
                file=sys.stderr,
                flush=True,
            )


class LogFile:
    """A file to which whole records are appended. Part of a record, left by a failed write, is removed before the next one.

    Args:
        path: in a folder that exists. It is not created: an output_dir that was renamed would come back with this file alone.
    """

    def __init__(self, path: Path):
        self.path = path
        self._whole: int | None = None  # bytes before a record whose write failed

    def append(self, record: bytes) -> None:
        """Append a record.

        Raises:
            OSError: when it cannot be written completely.
        """
        with self.path.open("ab", buffering=0) as stream:
            size = stream.seek(0, os.SEEK_END)
            if self._whole is not None and self._whole < size:
                size = stream.truncate(self._whole)
            self._whole = size
            while record:  # a disk that fills up takes a part, and the next write fails
                record = record[stream.write(record) :]
        self._whole = None  # not before it is closed: a network file system may report a full disk only then


class EventFile:
    """TensorBoard's event file of one start of a run.

    torch's SummaryWriter writes in a thread: after an error there it writes nothing more, and each later call raises.

    Args:
        folder: folder of the event files of all starts.
        purge_step: TensorBoard drops the steps from here on of earlier files.
    """

    _numbers = itertools.count()

    def __init__(self, folder: Path, purge_step: int):
        name = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(self._numbers)}"
        self._file = LogFile(folder / f"events.out.tfevents.{name}")
        start = SessionLog(status=SessionLog.START)
        self._head = [Event(file_version="brain.Event:2"), Event(step=purge_step, session_log=start)]

    def add(self, summaries: Sequence[Summary], step: int = 0) -> None:
        """Write summaries of a step."""
        records, now = BytesIO(), time.time()
        for event in (*self._head, *(Event(step=step, summary=summary) for summary in summaries)):
            event.wall_time = now
            RecordWriter(records).write(event.SerializeToString())
        with skip_failures("TensorBoard"):
            self._file.path.parent.mkdir(exist_ok=True)
            self._file.append(records.getvalue())
            self._head = []


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it; on failure the temporary file is removed. Its folder is created.

    Raises:
        OSError: when it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(exist_ok=True)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


class _Output:
    """Standard output or error that skips what cannot be written. Also at the exit, where Python turns an error into code 120."""

    def __init__(self, stream: TextIO, kind: str):
        self._stream, self._kind = stream, kind

    def write(self, text: str) -> int:
        with skip_failures(self._kind):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with skip_failures(self._kind):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def protect_output() -> None:
    """Make this process skip what cannot be printed, also by loggers that already hold the streams."""
    for name, kind in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, _Output):
            continue
        output = cast(TextIO, _Output(stream, kind))
        setattr(sys, name, output)
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in getattr(logger, "handlers", ()):
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    handler.stream = output
