"""Files that are whole on the disk before they have their names, after a power failure too."""

import os
from pathlib import Path

PARTIAL = ".partial-"
"""In the names of files that are being written; host and process follow, so that no two write the same one."""


def write_durably(path: Path, content: bytes) -> None:
    """Write a file under another name, and give it its own when it is on the disk."""
    partial = path.with_name(f"{path.name}{PARTIAL}{os.uname().nodename}-{os.getpid()}")
    write_synced(partial, content)
    os.replace(partial, path)
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
