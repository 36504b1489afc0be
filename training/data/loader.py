"""The order of training samples over ranks and micro-batches, and torch's DataLoader for it.

The global sample index counts the samples of the whole run over all ranks: optimizer step s trains the indices
s B .. (s + 1) B - 1, where B is the global batch size. All randomness of a sample depends only on (seed, global sample index)
(model/randomness.py), so ranks, micro-batches and restarts do not change what is trained, and exact resume needs only the step.
"""

from collections.abc import Iterator

import torch
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


class Samples(Dataset[dict]):
    """A map-style data set indexed by global sample index that also collates its samples."""

    def collate(self, samples: list[dict]):
        """Collate samples into a micro-batch."""
        raise NotImplementedError


def make_loader(
    samples: Samples, layout: BatchLayout, *, first_step: int, last_step: int, num_workers: int
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
