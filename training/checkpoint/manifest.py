"""The definition of a checkpoint on disk: the folder of one step whose manifest.json verifies.

A manifest is read before anything else is trusted, so its content is validated before it is used.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from latte_flow.model.files import read_json
from latte_flow.training.checkpoint.formats.zero_shards import MODEL_SUFFIX, OPTIMIZER_SUFFIX
from latte_flow.training.errors import UserError, naming

CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FOLDER = "model"
"""Folders in an output_dir: the checkpoints, and the model folder without weights (model_folder.py)."""
MANIFEST = "manifest.json"
LATEST = "latest"
"""DeepSpeed's file that names the newest checkpoint in a folder."""
PARTIAL_SUFFIX = ".partial"
"""Suffix of a folder that is being written."""
STEP_FOLDER = re.compile(r"step_(\d{7,})", re.ASCII)
FILE_NAME = re.compile(r"[\w-][\w.-]{0,254}", re.ASCII)
"""Names of files in a checkpoint: no path separators, so a manifest cannot refer to files outside the folder."""
DIGEST = re.compile(r"[0-9a-f]{64}")
TENSOR_PARALLEL = "tensor_parallel"
RUN_ID = "run_id"
"""The key under which a manifest names the run that wrote it; those of older versions have none."""
OWN_DIGEST = "sha256"
"""Manifest key of the SHA-256 of its own content; missing in manifests of older versions."""


def step_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:07d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, without partial ones. A folder without a manifest is damaged.

    The folder and the steps in it may be links; a step whose link is broken is damaged.

    Raises:
        UserError: when the folder is a broken link: a run would start again from zero.
    """
    if folder.is_symlink() and not folder.is_dir():
        raise UserError(f"{folder}: links to {os.readlink(folder)}, which is not there; accepted: a link to a folder")
    paths = [p for p in folder.glob("step_*") if STEP_FOLDER.fullmatch(p.name) and (p.is_dir() or p.is_symlink())]
    return sorted(paths, key=lambda path: (len(path.name), path.name))  # step_10000000 comes after step_9999999


def named_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints a path refers to, oldest first: one step's folder, or all of an output_dir. Does not verify them."""
    if path.is_dir() and (STEP_FOLDER.fullmatch(path.name) or (path / MANIFEST).is_file()):
        return [path]
    return list_checkpoints(path / CHECKPOINTS_FOLDER)


def output_dir_of(checkpoint: Path) -> Path:
    """Return the output_dir of a checkpoint's folder. ``checkpoints/`` and the step may be links to other places."""
    path = Path(os.path.abspath(checkpoint))
    while path.parent.name != CHECKPOINTS_FOLDER and path.is_symlink():
        path = Path(os.path.abspath(path.parent / os.readlink(path)))
    return path.parent.parent


def read_manifest(path: Path) -> dict:
    """Return a checkpoint's manifest: step, world_size, zero_stage, tensor_parallel (missing in older ones: 1), files.

    Raises:
        UserError: when it is missing or invalid.
    """

    def check(manifest: dict) -> dict:
        check_manifest(manifest)
        if (named := STEP_FOLDER.fullmatch(path.name)) and int(named[1]) != manifest["step"]:
            raise ValueError(f"it is of step {manifest['step']}")
        return manifest

    with naming():
        return read_json(path / MANIFEST, check)


def check_files(
    path: Path,
    share: Callable[[list[str]], list[str]] = list,
    *,
    contents: bool = True,
    record: Callable[[Path], dict] = read_manifest,
) -> Iterator[tuple[str, str]]:
    """Yield (file name, problem) for each file in this rank's share that does not match the manifest.

    Args:
        path: a checkpoint's folder.
        share: maps the list of files to the part to check.
        contents: whether to also read the files and verify their SHA-256.
        record: reads the record that lists the files.
    """
    try:
        files = record(path)["files"]
    except ValueError as error:
        yield MANIFEST, str(error)
        return
    if record is read_manifest:
        try:
            present = sorted(file.name for file in path.iterdir())
        except OSError as error:
            yield MANIFEST, f"its folder cannot be listed: {error.strerror}"
            return
        for name in share(present):
            if name not in files and name.endswith((MODEL_SUFFIX, OPTIMIZER_SUFFIX)):
                yield name, "is a shard that the manifest does not list"
    for name in share(sorted(files)):
        entry, file = files[name], path / name
        try:
            if not file.is_file():
                yield name, "is missing"
            elif file.stat().st_size != entry["bytes"]:
                yield name, f"has {file.stat().st_size} bytes instead of {entry['bytes']}"
            elif contents:
                with file.open("rb") as stream:
                    same = _sha256(stream) == entry["sha256"]
                if not same:
                    yield name, "has another SHA-256 than the manifest"
        except OSError as error:  # a rank that raised here would leave the others in a collective
            yield name, f"cannot be read: {error.strerror}"


def describe_file(path: Path) -> dict:
    """Sync a file that was just written to disk and return its manifest entry."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        return {"bytes": path.stat().st_size, "sha256": _sha256(stream)}


def _sha256(stream: BufferedReader) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest_digest(manifest: dict) -> str:
    """Return the SHA-256 of a manifest's content, excluding the digest itself."""
    content = {key: value for key, value in manifest.items() if key != OWN_DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_manifest(manifest: dict) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError for a manifest that ``save`` cannot have written."""
    files = manifest["files"]
    shards = sum(name.endswith(OPTIMIZER_SUFFIX) for name in files)
    numbers = {f"bytes of {name}": (entry["bytes"], 0, 2**63) for name, entry in files.items()}
    numbers |= {
        "step": (manifest["step"], 0, 2**63),
        "world_size": (manifest["world_size"], shards, shards + 1),
        "zero_stage": (manifest["zero_stage"], 1, 4),
        "tensor_parallel": (manifest.get(TENSOR_PARALLEL, 1), 1, shards + 1),
    }
    for name, (value, low, high) in numbers.items():
        if type(value) is not int or not low <= value < high:  # True fails too
            raise ValueError(f"{name}: {value!r}")
    for name, entry in files.items():
        if not FILE_NAME.fullmatch(name) or not DIGEST.fullmatch(entry["sha256"]):
            raise ValueError(f"files: {name!r} with SHA-256 {entry['sha256']!r}")
    models = sum(name.endswith(MODEL_SUFFIX) for name in files)
    tensor_parallel = manifest.get(TENSOR_PARALLEL, 1)
    expected = manifest["world_size"] if manifest["zero_stage"] == 3 else tensor_parallel
    if shards % tensor_parallel:
        raise ValueError(f"tensor_parallel: {tensor_parallel} does not divide world_size {shards}")
    if shards == 0 or models != expected:
        raise ValueError(
            f"files: {shards} *{OPTIMIZER_SUFFIX} and {models} *{MODEL_SUFFIX}; accepted: one or more, and {expected}"
        )
    if manifest.get(OWN_DIGEST, digest := manifest_digest(manifest)) != digest:
        raise ValueError("its SHA-256 does not match its content")
