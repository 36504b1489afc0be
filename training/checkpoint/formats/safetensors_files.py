"""safetensors: a single file, or Hugging Face's shards with an index."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from latte_flow.model.files import read_index, reading
from latte_flow.training.checkpoint.formats.source import MODEL, TensorInfo, WeightSource

WEIGHTS_FILE = "model.safetensors"
NUMBER = re.compile(r"-?[0-9]{1,4000}")
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsSource(WeightSource):
    """Reads one file, or the shards listed in an index.

    Args:
        path: a .safetensors file or an .index.json.

    Raises:
        ValueError: when a file is missing or damaged, or shards are of different steps.
    """

    def __init__(self, path: Path):
        self.path = path
        self.format = "safetensors" if path.suffix == ".safetensors" else "safetensors-sharded"
        placed = None if path.suffix == ".safetensors" else read_index(path)
        files = [path] if placed is None else sorted({path.parent / file for file in placed.values()})
        self._file_of: dict[str, Path] = {}
        self._tensors: dict[str, TensorInfo] = {}
        steps: dict[str | None, Path] = {}
        for file in files:
            with reading(file), safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                steps.setdefault(metadata.get("step"), file)
                self.kinds = (metadata.get("weights", MODEL),)
                for name in list(opened.keys()):
                    if name in self._file_of:
                        raise ValueError(f"{file}: holds {name}, which {self._file_of[name].name} also holds")
                    part = opened.get_slice(name)
                    self._file_of[name] = file
                    if part.get_dtype() not in DTYPES:
                        raise ValueError(f"{file}: {name} has dtype {part.get_dtype()}; accepted: {', '.join(DTYPES)}")
                    self._tensors[name] = TensorInfo(torch.Size(part.get_shape()), DTYPES[part.get_dtype()])
        if len(steps) > 1:
            raise ValueError(
                f"{path}: its shards are of different steps: "
                + ", ".join(f"{file.name} of step {step}" for step, file in steps.items())
            )
        step = next(iter(steps), None)
        self.step = int(step) if step is not None and NUMBER.fullmatch(step) else None
        for name, announced in (placed or {}).items():
            if name not in self._file_of:
                raise ValueError(f"{path}: {name} is not in {announced}, where the index places it")

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def _read(self, name: str, kind: str) -> Tensor:
        file = self._file_of[name]
        with reading(file), safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
