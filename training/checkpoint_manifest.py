"""manifest.json of a checkpoint: what belongs to it, and how a damaged manifest is told from what ``save`` writes.

A manifest is read before anything else is trusted, so nothing in it is followed that could not be a checkpoint's.
"""

import hashlib
import json
import re
from pathlib import Path

from training.errors import UserError
from training.zero_shards import OPTIMIZER_SUFFIX

MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"[\w-][\w.-]{0,254}", re.ASCII)
"""What files of a checkpoint are called: in the folder itself, so a manifest cannot lead out of it."""
DIGEST = re.compile(r"[0-9a-f]{64}")
OWN_DIGEST = "sha256"
"""The key under which a manifest has the SHA-256 of its own content; those of older versions have none."""


def read_manifest(path: Path) -> dict:
    """Return a checkpoint's manifest: step, world_size, zero_stage, files.

    Raises:
        UserError: when it is missing or not what ``save`` writes.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        _check_manifest(manifest)
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path / MANIFEST}: missing or damaged ({error})") from error


def manifest_digest(manifest: dict) -> str:
    """Return the SHA-256 of what a manifest says, all but this number."""
    content = {key: value for key, value in manifest.items() if key != OWN_DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_manifest(manifest: dict) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError for a manifest that ``save`` cannot have written."""
    files = manifest["files"]
    shards = sum(name.endswith(OPTIMIZER_SUFFIX) for name in files)
    numbers = {f"bytes of {name}": (entry["bytes"], 0, 2**63) for name, entry in files.items()}
    numbers |= {
        "step": (manifest["step"], 0, 2**63),
        "world_size": (manifest["world_size"], shards, shards + 1),
        "zero_stage": (manifest["zero_stage"], 1, 4),
    }
    for name, (value, low, high) in numbers.items():
        if type(value) is not int or not low <= value < high:  # nor is True a number
            raise ValueError(f"{name}: {value!r}")
    for name, entry in files.items():
        if not FILE_NAME.fullmatch(name) or not DIGEST.fullmatch(entry["sha256"]):
            raise ValueError(f"files: {name!r} with SHA-256 {entry['sha256']!r}")
    if shards == 0:
        raise ValueError(f"files: no *{OPTIMIZER_SUFFIX}")
    if manifest.get(OWN_DIGEST, digest := manifest_digest(manifest)) != digest:
        raise ValueError("it has another SHA-256 than it says")
