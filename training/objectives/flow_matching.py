"""Flow matching on timestep experts (paper sections 2 and 3): samples, batches and the loss.

Order, condition drop, flips, noise and timesteps are counter-based draws: they depend only on (seed, global sample index).

Shapes: b micro-batch, K groups, c image channels, R resolution, C latent channels, (H, W) latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from latte_flow.model.randomness import Stream, generator, permutation, uniform
from latte_flow.model.timestep_experts import TimestepExperts
from latte_flow.training.data.images import ImageDataset
from latte_flow.training.data.latents.dataset import LatentDataset
from latte_flow.training.data.loader import Samples


class FlowMatchingSamples(Samples):
    """Training samples by global sample index: the image, its prompt, its noise and its timesteps.

    Args:
        images: the data.
        experts: the intervals that timesteps are drawn from.
        latent_shape: (C, H, W) of the noise.
        seed: seed of the run.
        condition_drop: fraction of samples that get the null prompt.
        null_row: the row of the null prompt.
        horizontal_flip: whether half of the images are mirrored.
        groups_per_sample: with 1, sample i trains group i mod K; with ``all``, every group.
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
        """Return the image index of a global sample index: each epoch visits every image once, in a new order."""
        epoch, position = divmod(index, len(self.images))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self.seed, Stream.DATA_ORDER, epoch, len(self.images)))
        return int(self._order[1][position])

    def __getitem__(self, index: int) -> dict:
        """Return one sample: image [c, R, R] or latent [C, H, W], noise [C, H, W], groups [n], timesteps [n], prompt row.

        n is 1, or K with ``groups_per_sample: all``.
        """
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

    def collate(self, samples: list[dict]) -> "Batch":
        """Collate samples into a batch, ordered by group and within a group by global sample index."""
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


@dataclass
class Batch:
    """A micro-batch whose rows are ordered by group, in K equal parts.

    It holds images or precomputed latents. With ``groups_per_sample: all`` a sample takes K rows, but its image or latent is
    stored once: ``image_rows`` gives the index for each row.
    """

    images: Tensor | None  # [b, c, R, R]
    image_rows: Tensor  # [rows] int64
    noise: Tensor  # [rows, C, H, W]
    timesteps: Tensor  # [rows] float32
    groups: Tensor  # [rows] int64
    context_rows: Tensor  # [rows] int64, always on the CPU: the context cache is managed there
    sample_indices: Tensor  # [rows] int64, global
    latents: Tensor | None = None  # [b, C, H, W] bfloat16

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device, except ``context_rows``."""
        moved = self._map(lambda value: value.to(device, non_blocking=True))
        return replace(moved, context_rows=self.context_rows)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, **{name: function(value) for name, value in vars(self).items() if value is not None})
