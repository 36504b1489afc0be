"""Durable file writes: a file gets its final name only once it is complete on disk, so it survives a power failure."""

import os
from pathlib import Path

PARTIAL = ".partial-"
"""Marks the names of files being written. Host and process id follow, so that no two processes write the same file."""


def write_durably(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, then rename it atomically."""
    partial = path.with_name(f"{path.name}{PARTIAL}{os.uname().nodename}-{os.getpid()}")
    write_synced(partial, content)
    os.replace(partial, path)
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's directory entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
