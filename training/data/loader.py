"""From images to training batches: order, condition drop, flips, noise and timesteps, all counter-based.

Everything drawn for a sample depends on (seed, global sample index) alone (model/randomness.py). The global sample index counts
the samples of the whole run over all ranks: optimizer step s trains the indices s B .. (s + 1) B - 1, B the global batch size.
Hence ranks, micro-batches and restarts change nothing about what is trained, and exact resume needs only the step.

Shapes: b micro-batch, K groups, c image channels, R resolution, C latent channels, (H, W) latent size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from model.randomness import Stream, generator, permutation, uniform
from model.timestep_experts import TimestepExperts
from training.data.images import ImageDataset
from training.data.latents import LatentDataset
from training.preemption import ignore_stop_signals, kill_workers_at_exit


@dataclass(frozen=True)
class BatchLayout:
    """How an optimizer step's samples are spread over ranks and micro-batches.

    Micro-batch a of rank r holds the samples s B + (a W + r) b + (0 .. b - 1) of step s, W ranks, so any W and b that share
    B = a W b train the same samples.
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    rank: int

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def indices(self, step: int, micro_step: int) -> range:
        """Return this rank's global sample indices of one micro-batch."""
        first = step * self.global_batch_size + (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class MicroBatchSampler(Sampler[list[int]]):
    """Yields the global sample indices of this rank's micro-batches, from one optimizer step to another."""

    def __init__(self, layout: BatchLayout, first_step: int, last_step: int):
        self.layout, self.first_step, self.last_step = layout, first_step, last_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            for micro_step in range(self.layout.accumulation_steps):
                yield list(self.layout.indices(step, micro_step))

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.layout.accumulation_steps


class FlowMatchingSamples(Dataset):
    """Training samples by global sample index: the image, its prompt, its noise and its timesteps.

    Args:
        images: the data.
        experts: the intervals that timesteps are drawn from.
        latent_shape: (C, H, W) of the noise.
        seed: the run's.
        condition_drop: fraction of samples that get the null prompt.
        null_row: the row of the null prompt.
        horizontal_flip: whether half of the images are mirrored.
        groups_per_sample: 1, sample i trains group i mod K; ``all``, every group.
    """

    def __init__(
        self,
        images: ImageDataset | LatentDataset,
        experts: TimestepExperts,
        *,
        latent_shape: tuple[int, int, int],
        seed: int,
        condition_drop: float,
        null_row: int,
        horizontal_flip: bool,
        groups_per_sample: int | str = 1,
    ):
        self.images = images
        self.experts = experts
        self.latent_shape = latent_shape
        self.seed = seed
        self.condition_drop = condition_drop
        self.null_row = null_row
        self.horizontal_flip = horizontal_flip
        self.groups_per_sample = groups_per_sample
        self._order: tuple[int, np.ndarray] | None = None

    def data_index(self, index: int) -> int:
        """Return which image a global sample index trains: each epoch runs once through all of them in a new order."""
        epoch, position = divmod(index, len(self.images))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self.seed, Stream.DATA_ORDER, epoch, len(self.images)))
        return int(self._order[1][position])

    def __getitem__(self, index: int) -> dict:
        """Return one sample: image [c, R, R] or latent [C, H, W], noise [C, H, W], groups [n] and timesteps [n] (n = 1 or K), its
        prompt row."""
        flip = self.horizontal_flip and uniform(self.seed, Stream.FLIP, index) < 0.5
        sample = self.images.sample(self.data_index(index), flip=flip)
        row = sample.pop("row")
        if uniform(self.seed, Stream.CONDITION_DROP, index) < self.condition_drop:
            row = self.null_row
        noise = generator(self.seed, Stream.TRAINING_NOISE, index).standard_normal(self.latent_shape, dtype=np.float32)
        num_groups = self.experts.num_groups
        groups = torch.arange(num_groups) if self.groups_per_sample == "all" else torch.tensor([index % num_groups])
        draws = torch.from_numpy(generator(self.seed, Stream.TIMESTEP, index).random(num_groups, dtype=np.float32))
        return {
            **sample,
            "index": index,
            "noise": torch.from_numpy(noise),
            "groups": groups,
            "timesteps": self.experts.draw_timesteps(draws[groups], groups),
            "context_row": row,
        }


@dataclass
class Batch:
    """A micro-batch whose rows are ordered by group, in K equal parts.

    It holds images or, where they were encoded ahead, latents. With ``groups_per_sample: all`` a sample fills K rows, and each
    image or latent is held once: ``image_rows`` names it.
    """

    images: Tensor | None  # [b, c, R, R]
    image_rows: Tensor  # [rows] int64
    noise: Tensor  # [rows, C, H, W]
    timesteps: Tensor  # [rows] float32
    groups: Tensor  # [rows] int64
    context_rows: Tensor  # [rows] int64, always on the CPU: the cache of prompts is managed there
    sample_indices: Tensor  # [rows] int64, global
    latents: Tensor | None = None  # [b, C, H, W] bfloat16

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device, all but ``context_rows``."""
        moved = self._map(lambda value: value.to(device, non_blocking=True))
        return replace(moved, context_rows=self.context_rows)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{name: None if value is None else function(value) for name, value in vars(self).items()})


def collate(samples: list[dict]) -> Batch:
    """Put samples into a batch, ordered by group and within a group by global sample index."""
    rows = sorted(
        ((int(group), position, k) for position, s in enumerate(samples) for k, group in enumerate(s["groups"]))
    )
    positions = [position for _, position, _ in rows]
    return Batch(
        images=torch.stack([s["image"] for s in samples]) if "image" in samples[0] else None,
        latents=torch.stack([s["latent"] for s in samples]) if "latent" in samples[0] else None,
        image_rows=torch.tensor(positions),
        noise=torch.stack([samples[p]["noise"] for p in positions]),
        timesteps=torch.stack([samples[p]["timesteps"][k] for _, p, k in rows]),
        groups=torch.tensor([group for group, _, _ in rows]),
        context_rows=torch.tensor([samples[p]["context_row"] for p in positions]),
        sample_indices=torch.tensor([samples[p]["index"] for p in positions]),
    )


def make_loader(
    samples: FlowMatchingSamples, layout: BatchLayout, *, first_step: int, last_step: int, num_workers: int
) -> DataLoader:
    """Return the loader of this rank's micro-batches from one optimizer step to another.

    Workers are forked before the first batch and live to the end; a worker's failure raises here.
    """
    kill_workers_at_exit()
    return DataLoader(
        samples,
        batch_sampler=MicroBatchSampler(layout, first_step, last_step),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
