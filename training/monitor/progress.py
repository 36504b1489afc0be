"""Progress bars: redrawn in place in a terminal, one line per minute in a log.

A bar that redraws itself writes a carriage return every second; in the log of a long job that makes one line of megabytes.
"""

import os
import sys
from collections.abc import Iterable
from time import monotonic
from typing import TextIO

import diffusers
import transformers
from tqdm import tqdm

LINE_SECONDS = 60.0
"""Minimum interval between lines of a bar on a stream that is not a terminal."""
LINE_FORMAT = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(iterable: Iterable | None = None, *, stream: TextIO | None = None, **options) -> tqdm:
    """Return a progress bar on a stream.

    Args:
        iterable: the iterable to wrap, if any.
        stream: default: standard error. If it is not a terminal, the bar writes whole lines: at its start, every
            ``LINE_SECONDS`` and at its end.
        options: passed to tqdm. ``desc`` and a length are required in a log.
    """
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        return tqdm(iterable, file=stream, **options)
    return tqdm(iterable, file=_Lines(stream), bar_format=LINE_FORMAT, **options)


def hide_library_bars() -> None:
    """Disable the bars of transformers ("Loading weights"), diffusers, datasets and the hub if stderr is not a terminal."""
    if sys.stderr.isatty():
        return
    transformers.utils.logging.disable_progress_bar()  # the hub's too
    diffusers.utils.logging.disable_progress_bar()
    # datasets takes a second to import and reads this at import time.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1":
        sys.modules["datasets"].disable_progress_bars()


class _Lines:
    """A stream for tqdm that keeps the latest state of the bar and writes it as a line when one is due, and at the end."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._state = ""
        self._due = monotonic()

    def write(self, text: str) -> None:
        """Handle output of tqdm: a carriage return and the bar, or the final newline."""
        self._state = text.strip() or self._state
        if self._state and (text.endswith("\n") or monotonic() >= self._due):
            self._stream.write(f"{self._state}\n")
            self._stream.flush()
            self._state, self._due = "", monotonic() + LINE_SECONDS

    def flush(self) -> None:
        """Do nothing: lines are flushed when they are written."""
