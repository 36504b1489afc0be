"""One file of latents: validating it and locating its rows on opening, and reading rows during the run.

The file is memory-mapped only while it is opened. Rows are then read with ``pread``: accessing a mapped page that is no longer
available (file truncated, file system gone) kills the process with SIGBUS without a message, while a failed read is an error
that can be reported.

Shapes: C latent channels, (H, W) latent size.
"""

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import torch
from torch import Tensor

from latte_flow.training.errors import UserError

OPEN_FILES = 512
"""Maximum number of files a process keeps open; many systems allow 1024."""


@dataclass(frozen=True, eq=False)
class LatentShard:
    """The location of the latents in one file.

    Attributes:
        file: the file.
        shape: (C, H, W).
        offsets: byte offset of the first row, for each latent column.
    """

    file: Path
    shape: tuple[int, int, int]
    offsets: tuple[int, ...]

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one latent."""
        return 2 * math.prod(self.shape)

    def read(self, column: int, row: int) -> Tensor:
        """Return one latent [C, H, W] bfloat16.

        Args:
            column: index into ``offsets``.
            row: row in the shard.

        Raises:
            UserError: when the file has become shorter or can no longer be read.
        """
        latent = torch.empty(self.shape, dtype=torch.bfloat16)
        offset = self.offsets[column] + row * self.bytes_per_row
        accepted = "the file as it was; the same command then resumes from the last checkpoint"
        try:
            got = os.preadv(_open(self).fileno(), [latent.view(torch.int16).numpy().data], offset)
        except OSError as error:
            raise UserError(f"data.path: {self.file} cannot be read: {error.strerror}; accepted: {accepted}") from error
        if got != self.bytes_per_row:
            raise UserError(f"data.path: {self.file} was truncated while in use; accepted: {accepted}")
        return latent


@functools.lru_cache(maxsize=OPEN_FILES)
def _open(shard: LatentShard) -> BinaryIO:
    return shard.file.open("rb", buffering=0)


def open_shard(
    file: Path, *, shape: tuple[int, int, int], columns: tuple[str, ...], rows: int, num_labels: int | None
) -> tuple[LatentShard, pa.Array]:
    """Open and validate a file written by LatentWriter: a stream of one Arrow record batch.

    Args:
        file: the file; its size has been checked against the manifest.
        shape: (C, H, W).
        columns: names of the latent columns.
        rows: expected number of rows.
        num_labels: number of classes; None for captions.

    Returns:
        The shard, and the labels [rows] int64 or the captions [rows], dictionary-encoded.

    Raises:
        UserError: when the file is unreadable or its content differs from this.
    """
    try:
        with pa.memory_map(str(file)) as source:
            return _find(file, source.read_buffer(), shape, columns, rows, num_labels)
    # Arrow raises several kinds of errors, some of them ValueErrors; the end of the stream and missing columns raise others.
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data.path: {file} is damaged ({reason}); accepted: an intact copy, or encode its images again"
        ) from error


def _find(file: Path, content: pa.Buffer, shape, columns, rows: int, num_labels: int | None):
    batch = pa.ipc.open_stream(content).read_next_batch()
    if batch.num_rows != rows:
        raise ValueError(f"{batch.num_rows} rows instead of {rows}")
    offsets, accepted = [], pa.list_(pa.int16(), math.prod(shape))
    for name in columns:
        column = batch.column(name)
        if column.type != accepted or column.null_count:
            raise ValueError(f"{name} is {column.type} with {column.null_count} nulls instead of {accepted}")
        offsets.append(column.values.buffers()[1].address - content.address)
    name = "text" if num_labels is None else "label"
    conditions = batch.column(name)
    conditions.validate(full=True)
    if conditions.null_count:
        raise ValueError(f"{name} has {conditions.null_count} nulls")
    # Both copy: nothing may refer to the mapped file after it is closed.
    if num_labels is None:
        conditions = conditions.cast(pa.string()).dictionary_encode()
    else:
        labels = conditions.cast(pa.int64()).to_numpy(zero_copy_only=False).copy()
        if not 0 <= labels.min() <= labels.max() < num_labels:
            raise ValueError(f"labels {labels.min()} to {labels.max()} of {num_labels} classes")
        conditions = pa.array(labels)
    return LatentShard(file, shape, tuple(offsets)), conditions
