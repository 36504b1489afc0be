"""Where models are loaded from: a folder's own files, or the Hugging Face hub for a name that the user gave."""

import json
import os
import pickle
import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from latte_flow.model.errors import ArgumentError

WEIGHTS = (".safetensors", ".bin")
READ = (*WEIGHTS, ".json", ".jinja", ".txt", ".model")
"""Suffixes of the files that transformers and diffusers read."""
ACCEPTED = "a folder written by save_pretrained, or a hub id (NAME or ORGANISATION/NAME)"
T = TypeVar("T")


@contextmanager
def reading(path: str | Path, verdict: str = "damaged or in another format") -> Iterator[None]:
    """Turn what a library raises about a file that is missing, damaged or malicious into an ArgumentError that names it.

    Only around what reads the file: libraries raise any kind of error about a damaged one, and a bug would look the same.
    """
    try:
        yield
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        line = next((li.strip() for li in str(error).splitlines() if "Unsupported" in li or "GLOBAL" in li), error)
        raise ArgumentError(f"{path}: holds an object that is not a weight and was not executed ({line})") from error
    except Exception as error:
        if isinstance(error, ArgumentError) and str(error).startswith(str(path)):
            raise
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise ArgumentError(str(error)) from error
        if isinstance(error, OSError) and error.errno is not None:
            reason = "not found" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise ArgumentError(f"{error.filename or path}: {reason}") from error
        kind = "" if type(error) in (ValueError, ArgumentError) else f"{type(error).__name__}: "
        raise ArgumentError(f"{path}: {verdict} ({kind}{' '.join(str(error).split())})") from error


def read_json(file: Path, check: Callable[[Any], T], verdict: str = "damaged") -> T:
    """Return what ``check`` makes of the content of a JSON file: the one reader of all JSON files that others may have written.

    Args:
        file: the file, in UTF-8.
        check: returns the content, or raises any error, such as KeyError for a missing field.
        verdict: what the message says of such a file.

    Raises:
        ArgumentError: when the file is missing, cannot be read, is not JSON, or its content is refused; it names the file.
    """
    with reading(file, verdict):
        return check(json.loads(file.read_text(encoding="utf-8")))


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
    with loading(text):
        check_model_files(Path(text))
    return text


@contextmanager
def loading(path: str | Path) -> Iterator[None]:
    """As ``reading``, for a library that loads the model at an argument named ``path``."""
    try:
        with reading(path):
            yield
    except ArgumentError as error:
        raise ArgumentError(f"path: cannot load {error}") from error


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
    placed = read_json(path, lambda index: dict(index["weight_map"]))
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ArgumentError(f"{path}: places {name} in {file!r}; accepted: a file in the folder of the index")
        check_own_file(path.parent / file)
    return placed


SIZES = re.compile(r"num_\w+|\w+_(size|dim|channels)|depth")
MAX_SIZE = 2**20


def check_sizes(settings: Any, name: str = "") -> None:
    """Refuse a model's settings, as read from config.json, before a network of that size exhausts the memory or the time.

    Args:
        settings: the content of config.json, or of a field of it.
        name: of the field.

    Raises:
        ArgumentError: names the field.
    """
    if isinstance(settings, dict):
        for key, value in settings.items():
            check_sizes(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, list):
        for value in settings:
            check_sizes(value, name)
    elif isinstance(settings, int) and SIZES.fullmatch(name.rpartition(".")[2]) and not 0 <= settings <= MAX_SIZE:
        raise ArgumentError(f"{name}: got {reprlib.repr(settings)}; accepted: 0 to {MAX_SIZE}")


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
    settings = read_json(source, lambda content: content)
    portable = without_local_paths(settings)
    content = source.read_text(encoding="utf-8") if portable == settings else json.dumps(portable, indent=2) + "\n"
    target.write_text(content, encoding="utf-8")
