"""The folder that a conversion writes: what may be replaced, a name while it is incomplete, and its own name at the end."""

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
    """Refuse a folder that may not be written.

    Args:
        target: the output, resolved.
        source: the input, resolved.
        force: whether an earlier conversion may be replaced. Nothing else is: neither a folder with anything that its
            export.json does not list, nor one that the input lies in.

    Raises:
        UserError: names what is in the way and what is accepted.
    """
    if target.suffix in FILE_SUFFIXES:
        raise UserError(
            f"output: {target} looks like a file; accepted: a folder, which the weights' file is written into"
        )
    for parent in target.parents:
        if parent.name == CHECKPOINTS_FOLDER and (parent.parent / CONFIG_FILE).is_file():
            raise UserError(f"output: {target} is among the checkpoints of a run; accepted: another place")
    if not target.exists():
        return
    if not force:
        raise UserError(f"output: {target} exists; accepted: a new folder, or --force to replace an earlier conversion")
    if source.is_relative_to(target):
        raise UserError(f"output: {target} holds the input, {source}; accepted: another folder")
    if not target.is_dir() or (not (target / EXPORT_FILE).is_file() and any(target.iterdir())):
        raise UserError(f"output: {target} is no folder that a conversion has written; it is not replaced")
    try:
        record = read_export_record(target) or {"files": {}}
    except ValueError as error:
        raise UserError(f"output: {error}; it is not replaced") from error
    there = {str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir()}
    foreign = sorted(there - record["files"].keys() - {EXPORT_FILE})
    if foreign:
        raise UserError(f"output: {target} holds more than a conversion has written: {foreign[0]}; it is not replaced")


def make_partial_folder(target: Path) -> Path:
    """Make the folder that is written first: of this process, beside the target. Those of dead processes are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{target.name}{PARTIAL}{os.uname().nodename}-"
    for left in target.parent.glob(f"{prefix}*"):
        number = left.name.removeprefix(prefix)
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(left)
    partial = target.with_name(f"{prefix}{os.getpid()}")
    partial.mkdir()
    return partial


def replace(partial: Path, target: Path) -> None:
    """Give a complete folder its name; one that was there is removed only when the new one has it."""
    if not target.exists():
        os.replace(partial, target)
        sync_folder(target.parent)
        return
    old = partial.with_name(f"{partial.name}-old")
    os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        os.replace(old, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old)
