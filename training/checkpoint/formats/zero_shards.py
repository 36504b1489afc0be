"""Reads parameters by name from the shards of a ZeRO checkpoint, for every stage and number of ranks.

Stages 1 and 2 flatten and concatenate all parameters of an optimizer group and split the result into one part per rank; stage 3
splits every parameter into equal parts, the last one padded, and each rank concatenates its parts. With tensor parallelism every
tensor-parallel rank has shards of its own part of the network. The files are memory-mapped: reading a parameter reads only its
bytes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.checkpoint import constants
from deepspeed.utils import zero_to_fp32
from torch import Tensor

from latte_flow.model.tensor_split import join_parts, whole_shape
from latte_flow.training.checkpoint.formats.source import TensorInfo, check_counters, check_dense

OPTIMIZER_SUFFIX = "_optim_states.pt"
MODEL_SUFFIX = "_model_states.pt"
TENSOR_RANK = re.compile(r"mp_rank_(\d+)")
"""The tensor-parallel rank in a file name."""
STEP_KEY = "step"
STATE_KEYS = {
    1: ("single_partition_of_fp32_groups", "base_optimizer_state"),
    2: ("single_partition_of_fp32_groups", "base_optimizer_state"),
    3: ("fp32_flat_groups", "optimizer_state_dict"),
}
"""Stage -> the keys of the master weights and of the base optimizer's state in a shard."""


@dataclass(frozen=True)
class Piece:
    """A contiguous range of elements in flat tensor number ``flat`` of one rank."""

    rank: int
    flat: int
    start: int
    length: int


class ZeroShards:
    """The complete trained state in the files of one checkpoint. Open it inside checkpoint.io.safe_unpickling.

    Args:
        folder: folder of one step.

    Attributes:
        stage: ZeRO stage, 1 to 3.
        world_size: number of ranks that wrote it.
        tensor_parallel: number of tensor-parallel ranks that shared a network.
        shapes: name -> shape of the trained parameters.
        state_keys: optimizer tensors of each parameter: exp_avg, exp_avg_sq, ema; empty before the first update.
        updates: number of optimizer updates done, not counting skipped steps.
        model_states: the DeepSpeed model states of rank 0: counters, the trainer's entries, and that rank's part of the weights.
        param_groups: the settings of each optimizer group.

    Raises:
        FileNotFoundError: when the folder has no such files.
        ValueError: when shards are missing or of different steps; from the methods, when tensor-parallel ranks disagree about
            replicated values.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        model_files = _by_tensor_rank(zero_to_fp32.get_model_state_files(str(folder)))
        optimizer_files = _by_tensor_rank(zero_to_fp32.get_optim_files(str(folder)))
        self.tensor_parallel = len(model_files)
        if not set(model_files) == set(optimizer_files) == set(range(self.tensor_parallel)):
            raise ValueError(
                f"{folder}: holds weights of tensor-parallel ranks {sorted(model_files)} and shards of {sorted(optimizer_files)}"
            )
        self._parts = [_NetworkPart(model_files[rank], optimizer_files[rank]) for rank in range(self.tensor_parallel)]
        first = self._parts[0]
        self.stage, self.model_states, self.param_groups = first.stage, first.model_states, first.param_groups
        self.state_keys, self.updates = first.state_keys, first.updates
        self.world_size = sum(part.world_size for part in self._parts)
        self.shapes = {name: whole_shape(name, shape, self.tensor_parallel) for name, shape in first.shapes.items()}
        self._check_complete()

    def _check_complete(self) -> None:
        """Reject an incomplete checkpoint, and a mixture of several checkpoints."""
        written_by = self.model_states["dp_world_size"] * self.model_states["mp_world_size"]
        if written_by != self.world_size:
            raise ValueError(
                f"{self._folder}: holds the shards of {self.world_size} ranks, but {written_by} ranks wrote it"
            )
        updates = {number for part in self._parts for number in part.all_updates}
        if len(updates) > 1:
            raise ValueError(f"{self._folder}: its shards are of different updates: {sorted(updates)}")
        for part in self._parts:
            for states in part.all_model_states:
                check_counters(self._folder, states, self.updates)

    def read(self, name: str, key: str | None = None) -> Tensor:
        """Return a trained parameter's float32 master weight, or its optimizer tensor ``key``."""
        return self._join(name, self.read_parts(name, key))

    def read_parts(self, name: str, key: str | None = None) -> list[Tensor]:
        """Return each tensor-parallel rank's part of what ``read`` returns (the whole tensor if it is replicated)."""
        return [part.read(name, key) for part in self._parts]

    def read_all(self, key: str | None = None) -> dict[str, Tensor]:
        """Return name -> tensor for the whole model: trained parameters as ``read``, frozen ones, buffers, tied names."""
        tensors = {name: self.read_untrained(name) for name in self.untrained}
        tensors |= {name: self.read(name, key) for name in self.shapes}
        tied = {
            name: tensors[source] for name, source in self.model_states["shared_params"].items() if source in tensors
        }
        return tensors | tied

    @property
    def untrained(self) -> dict[str, TensorInfo]:
        """Name -> shape and dtype of the untrained parameters and the buffers."""
        return {
            name: TensorInfo(whole_shape(name, info.shape, self.tensor_parallel), info.dtype)
            for name, info in self._parts[0].untrained.items()
        }

    def read_untrained(self, name: str) -> Tensor:
        """Return an untrained parameter or a buffer in its own dtype."""
        return self._join(name, [part.read_untrained(name) for part in self._parts])

    def _join(self, name: str, parts: list[Tensor]) -> Tensor:
        try:
            return parts[0] if len(parts) == 1 else join_parts(name, parts)
        except ValueError as error:
            raise ValueError(f"{self._folder}: {error}") from error


class _NetworkPart:
    """Like ``ZeroShards``, for the part of the network that one tensor-parallel rank holds.

    Args:
        model_files: files with the part's weights; under stage 3 one per data-parallel rank.
        optimizer_files: its shards, one per data-parallel rank.
    """

    def __init__(self, model_files: list[str], optimizer_files: list[str]):
        shards = [_load(file)[constants.OPTIMIZER_STATE_DICT] for file in optimizer_files]
        self.all_model_states = [_load(file) for file in model_files]
        self.model_states = self.all_model_states[0]
        self.world_size = len(shards)
        self.stage = int(shards[0][constants.ZERO_STAGE])
        masters, optimizer = STATE_KEYS[self.stage]
        self._masters: list[list[Tensor]] = [list(shard[masters]) for shard in shards]
        self._states: list[dict[int, dict[str, Tensor]]] = [shard[optimizer]["state"] for shard in shards]
        self._paddings = shards[0].get(constants.PARAM_ALIGNMENT_PADDINGS)
        self.all_updates = {
            int(state[STEP_KEY]) for states in self._states for state in states.values() if STEP_KEY in state
        }
        first = next(iter(self._states[0].values()), {})
        self.state_keys = tuple(key for key in first if key != STEP_KEY)
        self.updates = int(first.get(STEP_KEY, 0))
        self.param_groups: list[dict] = shards[0][optimizer]["param_groups"]
        self.shapes: dict[str, torch.Size] = {
            name: torch.Size(shape) for group in self._param_shapes for name, shape in group.items()
        }
        self._pieces = dict(self._locate_by_rank() if self.stage == 3 else self._locate_by_group())

    def read(self, name: str, key: str | None = None) -> Tensor:
        sources = self._masters if key is None else [_flat_states(states, key) for states in self._states]
        parts = [sources[p.rank][p.flat].flatten()[p.start : p.start + p.length] for p in self._pieces[name]]
        shape = self.shapes[name]
        return torch.cat(parts)[: shape.numel()].view(shape)

    @property
    def untrained(self) -> dict[str, TensorInfo]:
        module, shared = self.model_states["module"], self.model_states["shared_params"]
        # Stage 1 does not save DeepSpeed's list of frozen parameters: they are the remaining names of the module.
        names = [name for name in module if name not in self.shapes and name not in shared]
        return {n: TensorInfo(torch.Size(self._frozen_shapes.get(n, module[n].shape)), module[n].dtype) for n in names}

    def read_untrained(self, name: str) -> Tensor:
        own, shape = self.model_states["module"][name], self._frozen_shapes.get(name)
        if self.stage < 3 or shape is None:
            return own
        # Under stage 3 the module's parameters are empty and each rank has a fragment, the last one padded.
        fragments = [states[constants.FROZEN_PARAM_FRAGMENTS][name].flatten() for states in self.all_model_states]
        return torch.cat(fragments)[: shape.numel()].view(shape)

    @property
    def _frozen_shapes(self) -> dict[str, torch.Size]:
        return self.model_states[constants.FROZEN_PARAM_SHAPES] or {}

    @property
    def _param_shapes(self) -> list[dict]:
        return self.model_states[constants.PARAM_SHAPES]

    def _locate_by_group(self) -> Iterator[tuple[str, list[Piece]]]:
        for group, shapes in enumerate(self._param_shapes):
            # Only the end of the flat tensor is padded, and the padding is not saved with the master weights.
            lengths = [masters[group].numel() for masters in self._masters]
            starts = [sum(lengths[:rank]) for rank in range(self.world_size)]
            paddings = self._paddings[group] if self._paddings else [0] * len(shapes)
            offset = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                end = offset + math.prod(shape)
                parts = [
                    (max(offset, s), min(end, s + n), s, r)
                    for r, (s, n) in enumerate(zip(starts, lengths, strict=True))
                ]
                yield name, [Piece(r, group, first - s, last - first) for first, last, s, r in parts if first < last]
                offset = end + padding

    def _locate_by_rank(self) -> Iterator[tuple[str, list[Piece]]]:
        lengths = [flat.numel() for flat in self._masters[0]]  # the same on every rank
        starts = [sum(lengths[:flat]) for flat in range(len(lengths))]
        offset = 0
        for name, shape in self.shapes.items():
            end = offset + math.ceil(shape.numel() / self.world_size)
            parts = [
                (max(offset, s), min(end, s + n), s, f) for f, (s, n) in enumerate(zip(starts, lengths, strict=True))
            ]
            yield (
                name,
                [
                    Piece(rank, flat, first - s, last - first)
                    for rank in range(self.world_size)
                    for first, last, s, flat in parts
                    if first < last
                ],
            )
            offset = end


def _by_tensor_rank(files: list[str]) -> dict[int, list[str]]:
    result: dict[int, list[str]] = {}
    for file in files:
        match = TENSOR_RANK.search(Path(file).name)
        assert match is not None  # the files were found by name
        result.setdefault(int(match[1]), []).append(file)
    return result


def _load(file: str) -> dict:
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    check_dense(file, content)
    return content


def _flat_states(states: dict[int, dict[str, Tensor]], key: str) -> list[Tensor]:
    return [states[index][key] for index in sorted(states)]
