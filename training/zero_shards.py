"""What the shards of a ZeRO checkpoint hold, by the names of the parameters, for every stage and number of ranks.

Stages 1 and 2 lay all parameters of an optimizer group end to end and cut the row into one part a rank; stage 3 cuts every
parameter into equal parts, the last one padded, and each rank lays its parts end to end. The files are memory-mapped: reading a
parameter reads its bytes and no others.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.checkpoint import constants
from deepspeed.utils import zero_to_fp32
from torch import Tensor

OPTIMIZER_SUFFIX = "_optim_states.pt"
MODEL_SUFFIX = "_model_states.pt"
STEP_KEY = "step"
STATE_KEYS = {
    1: ("single_partition_of_fp32_groups", "base_optimizer_state"),
    2: ("single_partition_of_fp32_groups", "base_optimizer_state"),
    3: ("fp32_flat_groups", "optimizer_state_dict"),
}
"""Where a stage's shard keeps the master weights and the base optimizer's state."""


@dataclass(frozen=True)
class Piece:
    """A run of elements of one rank's flat tensor number ``flat``."""

    rank: int
    flat: int
    start: int
    length: int


class ZeroShards:
    """The trained state in the files of one checkpoint. Open it inside checkpoint_io.safe_unpickling.

    Args:
        folder: of one step.

    Attributes:
        stage: of ZeRO, 1 to 3.
        world_size: how many ranks wrote it.
        shapes: name -> shape of the trained parameters.
        state_keys: what the optimizer keeps of each parameter: exp_avg, exp_avg_sq, ema; none before the first update.
        updates: optimizer updates done; steps that were skipped are none.
        model_states: DeepSpeed's file of the first rank: counters, and what the trainer added.
        param_groups: the optimizer's settings of each of its groups.

    Raises:
        FileNotFoundError: when the folder has no such files.
        ValueError: when shards are missing, or of different steps.
    """

    def __init__(self, folder: Path):
        self._model_files = zero_to_fp32.get_model_state_files(str(folder))
        shards = [_load(file)[constants.OPTIMIZER_STATE_DICT] for file in zero_to_fp32.get_optim_files(str(folder))]
        self.model_states = _load(self._model_files[0])
        self.world_size = len(shards)
        self.stage = int(shards[0][constants.ZERO_STAGE])
        masters, optimizer = STATE_KEYS[self.stage]
        self._masters: list[list[Tensor]] = [list(shard[masters]) for shard in shards]
        self._states: list[dict[int, dict[str, Tensor]]] = [shard[optimizer]["state"] for shard in shards]
        self._paddings = shards[0].get(constants.PARAM_ALIGNMENT_PADDINGS)
        first = next(iter(self._states[0].values()), {})
        self.state_keys = tuple(key for key in first if key != STEP_KEY)
        self.updates = int(first.get(STEP_KEY, 0))
        self.param_groups: list[dict] = shards[0][optimizer]["param_groups"]
        self._check_complete(folder)
        self.shapes: dict[str, torch.Size] = {
            name: torch.Size(shape) for group in self._param_shapes for name, shape in group.items()
        }
        self._pieces = dict(self._locate_by_rank() if self.stage == 3 else self._locate_by_group())

    def _check_complete(self, folder: Path) -> None:
        """Refuse a part of a checkpoint, and one put together of several."""
        written_by = self.model_states["dp_world_size"]
        if written_by != self.world_size:
            raise ValueError(f"{folder}: holds the shards of {self.world_size} ranks, but {written_by} have written it")
        updates = {int(state[STEP_KEY]) for states in self._states for state in states.values() if STEP_KEY in state}
        if len(updates) > 1:
            raise ValueError(f"{folder}: its shards are of different updates: {sorted(updates)}")

    def read(self, name: str, key: str | None = None) -> Tensor:
        """Return a trained parameter's float32 master weight, or what the optimizer keeps of it under ``key``."""
        sources = self._masters if key is None else [_flat_states(states, key) for states in self._states]
        parts = [sources[p.rank][p.flat].flatten()[p.start : p.start + p.length] for p in self._pieces[name]]
        shape = self.shapes[name]
        return torch.cat(parts)[: shape.numel()].view(shape)

    def read_all(self, key: str | None = None) -> dict[str, Tensor]:
        """Return name -> tensor of the whole model: trained parameters as ``read``, frozen ones, buffers, tied names."""
        tensors = self.buffers() | self.frozen() | {name: self.read(name, key) for name in self.shapes}
        tied = {
            name: tensors[source] for name, source in self.model_states["shared_params"].items() if source in tensors
        }
        return tensors | tied

    def buffers(self) -> dict[str, Tensor]:
        """Return the model's buffers; those of floating point as float32."""
        module, names = self.model_states["module"], self.model_states[constants.BUFFER_NAMES]
        return {n: t.float() if t.is_floating_point() else t for n, t in module.items() if n in names}

    def frozen(self) -> dict[str, Tensor]:
        """Return the parameters that are not trained."""
        if self.stage < 3:
            # DeepSpeed's list of frozen parameters is left out by stage 1; the module's weights are whole in stages 1 and 2.
            others = {*self.shapes, *self.model_states[constants.BUFFER_NAMES], *self.model_states["shared_params"]}
            return {name: t for name, t in self.model_states["module"].items() if name not in others}
        shapes = self.model_states[constants.FROZEN_PARAM_SHAPES] or {}
        parts = [_load(file)[constants.FROZEN_PARAM_FRAGMENTS] for file in self._model_files] if shapes else []
        return {
            name: torch.cat([part[name].flatten() for part in parts])[: shape.numel()].view(shape)
            for name, shape in shapes.items()
        }

    @property
    def _param_shapes(self) -> list[dict]:
        return self.model_states[constants.PARAM_SHAPES]

    def _locate_by_group(self) -> Iterator[tuple[str, list[Piece]]]:
        for group, shapes in enumerate(self._param_shapes):
            # Only the end of the row is padded, and the padding is not saved with the master weights.
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
        lengths = [flat.numel() for flat in self._masters[0]]  # every rank's are as long
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


def _load(file: str) -> dict:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _flat_states(states: dict[int, dict[str, Tensor]], key: str) -> list[Tensor]:
    return [states[index][key] for index in sorted(states)]
