"""The interface of all readers: lists the tensors of a source and reads them one at a time.

An exported folder also holds export.json: the format, the kind of weights, the step, and the size and SHA-256 of each file.
Files written by other programs have none and are read without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte_flow.model.files import read_json, reading

MODEL, EMA = "model", "ema"
"""Kinds of tensors: the trained weights and their moving average. Optimizer states have their AdamW names."""
EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
EXPORT_FILE = "export.json"
MAX_STEP = 2**63 - 1


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to resume from a checkpoint, in addition to weights and optimizer tensors.

    Attributes:
        shapes: name -> shape of the trained parameters.
        state_keys: optimizer tensors of each parameter: exp_avg, exp_avg_sq, ema.
        updates: number of optimizer updates done.
        model_states: DeepSpeed's counters and the trainer's entries; no tensors of the model.
        optimizer: the optimizer state without tensors of parameters, such as param_groups.
    """

    shapes: Mapping[str, torch.Size]
    state_keys: tuple[str, ...]
    updates: int
    model_states: dict
    optimizer: dict


class WeightSource(ABC):
    """Named tensors in the files of one format.

    Attributes:
        format: name of the format, as in ``--to`` of tools/convert_checkpoint.py.
        path: the opened path.
        kinds: available kinds of tensors; the first is the default of ``read``.
        step: optimizer steps the weights were trained for; None if not recorded.
        world_size: number of ranks whose files are combined; 1 for formats without ranks.
    """

    format: str
    path: Path
    kinds: tuple[str, ...] = (MODEL,)
    step: int | None = None
    world_size: int = 1
    training_state: TrainingState | None = None
    """Only for formats that training can resume from."""

    @property
    def default_kind(self) -> str:
        """The weights to sample with: the average if there is one."""
        return EMA if EMA in self.kinds else self.kinds[0]

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> shape and dtype of all weights, including buffers; tied weights under one of their names or all."""

    def read(self, name: str, kind: str | None = None) -> Tensor:
        """Return a tensor on the CPU. Untrained tensors are the same for all kinds.

        Args:
            name: one of ``tensors``.
            kind: one of ``kinds``; None for the first.

        Raises:
            ValueError: when the file is damaged or does not hold this kind.
        """
        if kind is not None and kind not in self.kinds:
            raise ValueError(f"{self.path}: holds no {kind}; accepted: {', '.join(self.kinds)}")
        return self._read(name, kind or self.kinds[0])

    @abstractmethod
    def _read(self, name: str, kind: str) -> Tensor:
        """Implement ``read`` for an available kind; formats with a single kind may ignore it."""


def read_export_record(folder: Path) -> dict | None:
    """Return the content of export.json, or None if there is none.

    Raises:
        ValueError: when it is damaged.
    """

    def check(record: dict) -> dict:
        for name, entry in record["files"].items():
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"files: {name}")
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"files: {name} is not in its folder")
        for key, kind in {"format": str, "weights": str | None, "step": int | None}.items():
            if not isinstance(record[key], kind):
                raise ValueError(f"{key}: {record[key]!r}")
        return record

    path = folder / EXPORT_FILE
    return read_json(path, check) if path.is_file() else None


def require_export_record(folder: Path) -> dict:
    """Return what export.json says.

    Raises:
        ValueError: when it is missing or damaged.
    """
    record = read_export_record(folder)
    if record is None:
        raise ValueError(f"{folder} has no {EXPORT_FILE}")
    return record


def check_export_sizes(folder: Path, record: dict) -> None:
    """Raise ValueError when a file of an exported folder is missing or its size differs from export.json."""
    for name, entry in record["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: is missing, but {EXPORT_FILE} names it")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(f"{file}: has {file.stat().st_size} bytes instead of {entry['bytes']}")


def trained_step(model_states: Mapping) -> int | None:
    """Return the step recorded in DeepSpeed's model states: the trainer's, or DeepSpeed's own."""
    return next((model_states[key] for key in ("step", "global_steps") if isinstance(model_states.get(key), int)), None)


def check_step(source: WeightSource) -> None:
    """Raise ValueError when a source's step or number of updates is not one that a run can have."""
    updates = source.training_state.updates if source.training_state else None
    for name, number in (("step", source.step), ("number of updates", updates)):
        if number is not None and not 0 <= number <= MAX_STEP:
            shown = number if number.bit_length() <= 64 else f"an integer of {number.bit_length()} bits"
            raise ValueError(f"{source.path}: its {name} is {shown}; accepted: 0 to {MAX_STEP}")


def kinds_of_training(state_keys: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of tensors in a checkpoint with optimizer state: the weights, their average, the others."""
    return (MODEL, *sorted(state_keys, key=lambda key: key != EMA))


def check_counters(path: Path, model_states: Mapping, updates: int) -> None:
    """Raise ValueError when DeepSpeed's counters and the optimizer's disagree on the step."""
    steps, skipped = model_states["global_steps"], model_states["skipped_steps"]
    if steps - skipped != updates:
        raise ValueError(
            f"{path}: its files are of different steps: the optimizer has done {updates} updates, the weights are of step "
            f"{steps}, {skipped} of them skipped"
        )


def load_torch_file(path: Path):
    """Read a file written by torch.save, memory-mapped, without executing code from it.

    Raises:
        ValueError: when it is damaged or contains anything but tensors and plain containers.
    """
    with reading(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files written before torch 1.6 cannot be memory-mapped
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_dense(path, content)
        return content


def check_dense(path: str | Path, content: Any, name: str = "") -> None:
    """Raise ValueError for a tensor whose elements are not plain real numbers in the file.

    Args:
        path: the file.
        content: what is in it: tensors, in containers of any depth.
        name: the keys that lead to the content.
    """
    if isinstance(content, Tensor):
        kinds = {"quantised": content.is_quantized, "nested": content.is_nested, "meta": content.is_meta}
        float8 = content.is_floating_point() and content.dtype.itemsize == 1
        kinds |= {
            str(content.layout): content.layout != torch.strided,
            str(content.dtype): content.is_complex() or float8,
        }
        if kind := next((kind for kind, is_kind in kinds.items() if is_kind), None):
            raise ValueError(
                f"{path}: {name} is a {kind} tensor; accepted: dense tensors of real numbers of 16 bits or more, or integers"
            )
    elif isinstance(content, dict | list | tuple):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            check_dense(path, value, f"{name}.{key}" if name else str(key))
