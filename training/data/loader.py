"""The order of training samples over ranks and micro-batches, and torch's DataLoader for it.

The global sample index counts the samples of the whole run over all ranks: optimizer step s trains the indices
s B .. (s + 1) B - 1, where B is the global batch size. All randomness of a sample depends only on (seed, global sample index)
(model/randomness.py), so ranks, micro-batches and restarts do not change what is trained, and exact resume needs only the step.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from latte_flow.training.data.workers import ignore_stop_signals, kill_workers_at_exit
from latte_flow.training.distributed.batch_layout import BatchLayout


class MicroBatchSampler(Sampler[list[int]]):
    """Yields the global sample indices of this rank's micro-batches, from ``first_step`` up to but excluding ``last_step``."""

    def __init__(self, layout: BatchLayout, first_step: int, last_step: int):
        self.layout, self.first_step, self.last_step = layout, first_step, last_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            for micro_step in range(self.layout.accumulation_steps):
                yield list(self.layout.indices(step, micro_step))

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.layout.accumulation_steps


@dataclass
class Batch:
    """A micro-batch of one objective, in rows. Subclasses add fields, each a tensor or None."""

    sample_indices: Tensor  # [rows] int64, global

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **{name: function(value) for name, value in vars(self).items() if value is not None})


class Samples(Dataset[dict]):
    """A map-style data set indexed by global sample index that also collates its samples."""

    def collate(self, samples: list[dict]) -> Batch:
        """Collate samples into a micro-batch."""
        raise NotImplementedError


class JointSamples(Dataset[dict]):
    """The samples of several objectives at the same global sample indices: name -> sample, and name -> batch."""

    def __init__(self, parts: Mapping[str, Samples]):
        self.parts = parts

    def __getitem__(self, index: int) -> dict[str, dict]:
        """Return the samples of a global sample index."""
        return {name: part[index] for name, part in self.parts.items()}

    def collate(self, samples: list[dict[str, dict]]) -> dict[str, Batch]:
        """Collate each objective's samples."""
        return {name: part.collate([sample[name] for sample in samples]) for name, part in self.parts.items()}


def make_loader(
    samples: Samples | JointSamples, layout: BatchLayout, *, first_step: int, last_step: int, num_workers: int
) -> DataLoader:
    """Return the loader of this rank's micro-batches, from ``first_step`` up to but excluding ``last_step``.

    Workers are forked before the first batch and live until the end; a worker's failure is raised by the loader.
    """
    kill_workers_at_exit()
    return DataLoader(
        samples,
        batch_sampler=MicroBatchSampler(layout, first_step, last_step),
        collate_fn=samples.collate,
        num_workers=num_workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
