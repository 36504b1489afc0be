"""Finds the damaged file of a data set, and detects files that were truncated while in use.

Data set readers raise many kinds of errors, few of which name a file. So after an error the files are read one by one until one
fails. This costs nothing as long as there are no errors.
"""

import bisect
import contextlib
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from latte_flow.training.errors import UserError

STATE_FILE = "state.json"
"""Written by save_to_disk next to its Arrow files."""
STATE_KEYS = (
    "_data_files",
    "_fingerprint",
    "_format_columns",
    "_format_kwargs",
    "_format_type",
    "_output_all_columns",
    "_split",
)
END_OF_TAR = bytes(1024)
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def damaged_file(files: Iterable[Path]) -> tuple[Path, str] | None:
    """Return the first unreadable file and the reason, or None if all are readable. Reads every byte."""
    for file in files:
        try:
            if not os.path.getsize(file):
                return file, "is empty"
            _READERS.get(file.suffix, _read)(file)
        except Exception as error:  # any error means that the file is damaged
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {' '.join(str(error).split())}"
            return file, f"cannot be read ({reason})"
    return None


def check_end(file: Path) -> None:
    """Reject a stream of Arrow record batches that was truncated between two batches: it would be read as a shorter one.

    Raises:
        UserError: when the end marker, which ``save_to_disk`` writes, is missing.
    """
    with file.open("rb") as stream:
        stream.seek(max(file.stat().st_size - len(END_OF_STREAM), 0))
        if stream.read() != END_OF_STREAM:
            raise UserError(
                f"data.path: {file} is truncated: its end marker is missing; accepted: an intact copy of it"
            )


def check_tars(files: Iterable[Path], copy: Path) -> None:
    """Reject tar files with a damaged header, which readers treat as the end: they would silently see fewer images.

    Args:
        files: tar files.
        copy: the cache folder of ``datasets`` for these files; a marker file there records that they were intact.

    Raises:
        UserError: naming the first damaged file.
    """
    mark = copy / "tar_files_were_whole"
    if mark.exists():
        return
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                _check_headers(tar)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"data.path: {file} cannot be read ({error}); accepted: an intact copy of it") from error
    with contextlib.suppress(OSError):  # another user's cache: then the files are checked at every start
        mark.touch()


def _check_headers(tar: tarfile.TarFile) -> None:
    for _ in tar:
        pass
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(len(END_OF_TAR)) != END_OF_TAR:
        raise tarfile.ReadError(f"neither a file header nor the end of the archive at byte {tar.offset}")


class MappedFiles:
    """Files that stay memory-mapped during a run. Reading a page of a truncated file kills the process with SIGBUS.

    Args:
        files: the files, already mapped.
        rows: number of data set rows in each file, in order; None if unknown.
    """

    def __init__(self, files: Iterable[Path], rows: Sequence[int] | None):
        self._found = [(file, os.stat(file)) for file in files]
        self._ends = None if rows is None else list(itertools.accumulate(rows))

    def check(self, row: int) -> None:
        """Raise UserError when the file of a row has become shorter. A removed or replaced file stays mapped unchanged."""
        found = self._found if self._ends is None else [self._found[bisect.bisect(self._ends, row)]]
        for file, before in found:
            try:
                now = os.stat(file)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise UserError(
                    f"data.path: {file} cannot be read: {error.strerror}; accepted: the file as it was"
                ) from error
            if now.st_size < before.st_size and os.path.samestat(now, before):
                raise UserError(f"data.path: {file} was truncated while in use; accepted: the file as it was")


def _read(file: Path) -> None:
    with file.open("rb") as stream:
        while stream.read(1 << 20):
            pass


def _read_parquet(file: Path) -> None:
    with pq.ParquetFile(file) as table:
        _read_schema(table.schema_arrow)
        for group in range(table.num_row_groups):
            table.read_row_group(group).validate(full=True)


def _read_arrow(file: Path) -> None:
    with pa.OSFile(str(file)) as source:
        stream = pa.ipc.open_stream(source)
        _read_schema(stream.schema)
        for batch in stream:
            batch.validate(full=True)


def _read_schema(schema: pa.Schema) -> None:
    import datasets  # takes a second to import

    datasets.Features.from_arrow_schema(schema)


def _read_tar(file: Path) -> None:
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            if member.isfile():
                stream = tar.extractfile(member)
                assert stream is not None  # None only for links and special files
                stream.read()
        _check_headers(tar)


def _read_json(file: Path) -> None:
    content = json.loads(file.read_bytes())
    if file.name == STATE_FILE:
        _ = [content[key] for key in STATE_KEYS], [entry["filename"] for entry in content["_data_files"]]


def _read_json_lines(file: Path) -> None:
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error


_READERS: dict[str, Callable[[Path], None]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".tar": _read_tar,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
}
