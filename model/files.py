"""Where models are loaded from: a folder's own files, or the Hugging Face hub for a name that the user gave."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from latte_flow.model.errors import ArgumentError

WEIGHTS = (".safetensors", ".bin")
READ = (*WEIGHTS, ".json", ".jinja", ".txt", ".model")
"""Suffixes of the files that transformers and diffusers read."""
ACCEPTED = "a folder written by save_pretrained, or a hub id (NAME or ORGANISATION/NAME)"


def locate(path: str | Path, *, download: bool = True) -> str:
    """Return what ``from_pretrained`` may load: a folder, or a hub id.

    Args:
        path: folder or hub id.
        download: False for a hub id that a checkpoint names: a file that somebody else wrote starts no download. Its folder in
            the local cache is returned.

    Raises:
        ArgumentError: when it is neither (transformers would ask the hub for a mistyped folder), a hub id is not in the cache, or
            a folder's files lead out of it.
    """
    text = os.fspath(path)
    if not os.path.isdir(text):
        if not is_hub_id(text):
            raise ArgumentError(f"path: cannot load {text}: not found; accepted: {ACCEPTED}")
        if download:
            return text
        snapshot = cached_snapshot(text)
        if snapshot is None or not any(file.suffix in WEIGHTS for file in snapshot.iterdir()):
            raise ArgumentError(
                f"path: cannot load {text}: it is not in this machine's hub cache, and a checkpoint that names it starts no "
                f"download; accepted: the same command after `hf download {text}`, or another path"
            )
        text = str(snapshot)
    try:
        check_model_files(Path(text))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"path: cannot load {text}: {error}") from error
    return text


def is_hub_id(text: str, repo_type: str = "model") -> bool:
    """Return whether a text names a hub repository, not a path: a file, or a missing folder in a folder that exists."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    if os.path.lexists(text):
        return False
    parent = os.path.dirname(text)
    return not parent or not os.path.exists(parent) or cached_snapshot(text, repo_type) is not None


def cached_snapshot(hub_id: str, repo_type: str = "model") -> Path | None:
    """Return the folder of a hub repository in the local cache, or None; it may lack files that were never downloaded."""
    try:
        return Path(snapshot_download(hub_id, repo_type=repo_type, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def is_own_file(file: Path, folder: Path) -> bool:
    """Return whether a path is a regular file inside a folder.

    Links count if they stay in the folder. The links of a hub cache, from a snapshot to the same repository's blobs, count too.
    """
    target, root = file.resolve(), folder.resolve()
    snapshots = next((p for p in (root, *root.parents) if p.name == "snapshots"), None)
    places = [root] if snapshots is None else [root, snapshots.parent / "blobs"]
    return target.is_file() and any(target.is_relative_to(place) for place in places)


def check_own_file(file: Path) -> None:
    """Raise ArgumentError for a path that is neither missing, nor a folder, nor a file that ``is_own_file`` accepts."""
    if os.path.lexists(file) and not file.is_dir() and not is_own_file(file, file.parent):
        raise ArgumentError(
            f"{file}: no regular file of its folder; accepted: a file, or a link inside the folder or inside a hub cache"
        )


def check_model_files(folder: Path) -> None:
    """Refuse a folder whose files would make transformers or diffusers read files elsewhere.

    Raises:
        ArgumentError: names the file, and what is accepted.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in READ:
            check_own_file(file)
        if file.name.endswith(".index.json"):
            read_index(file)


def read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file name from a Hugging Face shard index; the files are in the folder of the index.

    Raises:
        ArgumentError: when it is damaged or refers to files outside its folder.
    """
    try:
        placed = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArgumentError(f"{path}: damaged or in another format ({type(error).__name__}: {error})") from error
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ArgumentError(f"{path}: places {name} in {file!r}; accepted: a file in the folder of the index")
        check_own_file(path.parent / file)
    return placed


def check_config(config: Any) -> None:
    """Refuse a model's configuration that makes transformers fetch code from the hub, or weights from another folder.

    Args:
        config: a transformers configuration.

    Raises:
        ArgumentError: names the setting.
    """
    kernel = config._attn_implementation
    if kernel is not None and "/" in kernel:
        raise ArgumentError(f"_attn_implementation: {kernel!r} is code from the hub; accepted: sdpa, eager")
    weights = getattr(config, "transformers_weights", None)
    if weights is not None and Path(weights).name != weights:
        raise ArgumentError(f"transformers_weights: {weights!r}; accepted: a file in the folder of config.json")


def without_local_paths(settings: Any) -> Any:
    """Return settings read from JSON without the absolute paths that libraries leave in them, such as ``_name_or_path``."""
    if isinstance(settings, list):
        return [without_local_paths(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        key: without_local_paths(value)
        for key, value in settings.items()
        if not (str(key).endswith(("name_or_path", "_file")) and isinstance(value, str) and os.path.isabs(value))
    }


def copy_settings(source: Path, target: Path) -> None:
    """Copy a JSON file ``without_local_paths``; the source may be the target.

    Raises:
        ArgumentError: when it is damaged.
    """
    content = source.read_text(encoding="utf-8")
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{source}: damaged ({error})") from error
    portable = without_local_paths(settings)
    target.write_text(content if portable == settings else json.dumps(portable, indent=2) + "\n", encoding="utf-8")
