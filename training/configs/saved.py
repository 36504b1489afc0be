"""The saved configuration of a run: writing, reading, and comparing it with the command that resumes the run."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import yaml

from latte_flow.training.configs.checked import OptionalPath, PathText
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.durable import write_durably
from latte_flow.training.errors import UserError

CONFIG_FILE = "config.yaml"
"""File in an output_dir: the fully resolved configuration."""


def load_config(path: Path) -> TrainingConfig:
    """Read the fully resolved configuration of a run, written by ``save_config``.

    Raises:
        UserError: when the file is missing or is not a training configuration.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found; accepted: the config.yaml of a training output_dir")
    try:
        return parse_config(["--config", str(path)])
    except UserError as error:  # the error names no file
        raise UserError(f"{path}: {error}") from error


def save_config(config: TrainingConfig, path: Path) -> None:
    """Write every field with its value as YAML; the file is replaced atomically."""
    write_durably(path, to_yaml(config).encode())


def portable_config(config: Any) -> Any:
    """Return a configuration whose absolute paths are reduced to their last part, for a file that leaves this machine."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = portable_config(value)
        elif field.type in (PathText, OptionalPath) and value is not None and os.path.isabs(value):
            changes[field.name] = Path(value).name
    return dataclasses.replace(config, **changes)


def to_yaml(config: TrainingConfig) -> str:
    """Return every field with its value as YAML text."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that does not start with a letter or a slash: YAML parsers disagree on what 0E0 is."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if re.match(r"[A-Za-z/]", text) else '"')


_Dumper.add_representer(str, _represent_text)


# What may change on resume: the length of the run, logging and saving, and the distribution over machines.
RESUMABLE_CHANGES = (
    "output_dir",
    "run_id",
    "deepspeed",
    "resume",
    "max_steps",
    "micro_batch_size",
    "tensor_parallel",
    "activation_checkpointing",
    "data.num_workers",
    "data.allow_changed",
    "checkpoint",
    "health",
    "logging",
    "sample",
    "model.attention_backend",
    "vlm.context_cache",
    "vlm.context_cache_gib",
)


def differences(saved: TrainingConfig, current: TrainingConfig) -> list[str]:
    """Return one line per field that differs between a saved run and the command resuming it but must not."""

    def flatten(tree: dict, prefix: str = "") -> dict:
        flat: dict[str, object] = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                flat |= flatten(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = list(value) if isinstance(value, tuple) else value
        return flat

    old, new = (flatten(dataclasses.asdict(c)) for c in (saved, current))
    return [
        f"{name}: the run has {old.get(name)!r}, this command {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and not any(name == change or name.startswith(change + ".") for change in RESUMABLE_CHANGES)
    ]
