"""The output folder of a conversion: what it may replace, its temporary name while incomplete, and the final rename."""

import errno
import glob
import os
import shutil
from pathlib import Path

from latte_flow.training.checkpoint.formats.source import EXPORT_FILE, read_export_record
from latte_flow.training.checkpoint.manifest import CHECKPOINTS_FOLDER
from latte_flow.training.configs.saved import CONFIG_FILE
from latte_flow.training.durable import PARTIAL, sync_folder
from latte_flow.training.errors import UserError

FILE_SUFFIXES = (".safetensors", ".pt", ".bin", ".pth")


def check_output(target: Path, source: Path, *, force: bool) -> None:
    """Refuse an output folder that may not be written.

    Args:
        target: the output, resolved.
        source: the input, resolved.
        force: whether an earlier conversion may be replaced. Nothing else ever is: neither a folder with files that its
            export.json does not list, nor one that contains the input.

    Raises:
        UserError: names what is in the way and what is accepted.
    """
    if target.suffix in FILE_SUFFIXES:
        raise UserError(f"output: {target} looks like a file; accepted: a folder for the weights' file")
    check_not_of_a_run(target)
    if not target.exists():
        return
    if not force:
        raise UserError(f"output: {target} exists; accepted: a new folder, or --force to replace an earlier conversion")
    if source.is_relative_to(target):
        raise UserError(f"output: {target} holds the input, {source}; accepted: another folder")
    _check_only_converted(target)


def check_not_of_a_run(target: Path) -> None:
    """Raise UserError for an output below the checkpoints of a run."""
    for parent in target.parents:
        if parent.name == CHECKPOINTS_FOLDER and (parent.parent / CONFIG_FILE).is_file():
            raise UserError(f"output: {target} is among the checkpoints of a run; accepted: another place")


def _check_only_converted(folder: Path, name: Path | None = None) -> None:
    """Refuse a folder with files that its export.json does not list.

    Args:
        folder: the folder to check.
        name: its name in error messages, if different.

    Raises:
        UserError: names a file that is in the way.
    """
    name = name or folder
    if not folder.is_dir() or (not (folder / EXPORT_FILE).is_file() and any(folder.iterdir())):
        raise UserError(f"output: {name} was not written by a conversion; it is not replaced")
    try:
        record = read_export_record(folder) or {"files": {}}
    except ValueError as error:
        raise UserError(f"output: {error}; it is not replaced") from error
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    foreign = sorted(there - record["files"].keys() - {EXPORT_FILE})
    if foreign:
        raise UserError(f"output: {name} holds files that no conversion wrote: {foreign[0]}; it is not replaced")


def make_partial_folder(target: Path) -> Path:
    """Create this process's temporary folder beside the target. Those of dead processes are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{target.name}{PARTIAL}{os.uname().nodename}-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        number = left.name.removeprefix(prefix)
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(left)
    partial = target.with_name(f"{prefix}{os.getpid()}")
    partial.mkdir()
    return partial


def put_in_place(partial: Path, target: Path, *, force: bool) -> None:
    """Rename a complete folder to its final name, after checking again what has appeared there since ``check_output``.

    Args:
        partial: the folder.
        target: its final name. An empty folder there is replaced.
        force: as for ``check_output``. The earlier conversion is removed once the new one has its name.

    Raises:
        UserError: when the target exists and may not be replaced; it is left unchanged.
    """
    try:
        os.rename(partial, target)  # fails if the target is a file or a non-empty folder
        sync_folder(target.parent)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    if not force:
        raise UserError(f"output: {target} appeared during the conversion; it is not replaced")
    # Moved away first, so that nobody adds files to it between the check and the removal.
    old = partial.with_name(f"{partial.name}-old")
    os.rename(target, old)
    try:
        _check_only_converted(old, target)
        os.rename(partial, target)
    except (OSError, UserError):
        os.rename(old, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old)
