"""Flow matching on timestep experts (paper sections 2 and 3): samples, batches, the loss, and what is reported of it.

Order, condition drop, flips, noise and timesteps are counter-based draws: they depend only on (seed, global sample index).

Shapes: b micro-batch, K groups, c image channels, R resolution, C latent channels, (H, W) latent size.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.flow_matching import NUM_TRAIN_TIMESTEPS, flow_matching_loss, interpolate
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.randomness import Stream, generator, permutation, uniform
from latte_flow.model.timestep_experts import TimestepExperts
from latte_flow.training.components import compute_dtype
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.data.context_cache import ContextSource, PromptEncoder, open_context_source
from latte_flow.training.data.images import ImageDataset
from latte_flow.training.data.latents.dataset import LatentDataset
from latte_flow.training.data.loader import Batch, Samples
from latte_flow.training.data.prompts import FEW_PROMPTS, PromptTokens
from latte_flow.training.distributed.batch_layout import BatchLayout
from latte_flow.training.distributed.collectives import print_once
from latte_flow.training.errors import UserError, naming
from latte_flow.training.monitor.metrics import MetricsWriter
from latte_flow.training.monitor.sample_grid import SampleGrid, check_sampler, samples_per_rank
from latte_flow.training.objectives.base import Counts, MetaParts, Objective, RunParts, register_objective
from latte_flow.training.objectives.flow_matching_cost import count_flow_matching


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
        latent_shape: tuple[int, ...],
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

    def collate(self, samples: list[dict]) -> "FlowMatchingBatch":
        """Collate samples into a batch, ordered by group and within a group by global sample index."""
        rows = sorted(
            ((int(group), position, k) for position, s in enumerate(samples) for k, group in enumerate(s["groups"]))
        )
        positions = [position for _, position, _ in rows]
        return FlowMatchingBatch(
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
class FlowMatchingBatch(Batch):
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
    latents: Tensor | None = None  # [b, C, H, W] bfloat16

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device, except ``context_rows``."""
        return replace(super().to(device), context_rows=self.context_rows)


def loss_names(num_groups: int, timestep_bins: int) -> list[str]:
    """Return the metrics of the loss: of each group, then of each of the equal bins of tau."""
    edges = [round(i * NUM_TRAIN_TIMESTEPS / timestep_bins) for i in range(timestep_bins + 1)]
    return [f"loss_group_{group}" for group in range(num_groups)] + [
        f"loss_tau_{low:04d}_{high:04d}" for low, high in itertools.pairwise(edges)
    ]


def loss_columns(groups: Tensor, timesteps: Tensor, num_groups: int, timestep_bins: int) -> Tensor:
    """Return the places in ``loss_names`` of the rows of groups [rows] at timesteps [rows]: int64 [2, rows]."""
    bins = (timesteps / NUM_TRAIN_TIMESTEPS * timestep_bins).long().clamp(max=timestep_bins - 1)
    return torch.stack([groups, num_groups + bins])


@register_objective("flow_matching")
class FlowMatching(Objective):
    """The loss of paper Eq. 1, each group on its own training interval."""

    cards: ClassVar[Mapping[str, str]] = {"loss_group_": "loss_per_group/", "loss_tau_": "loss_per_timestep/"}

    @classmethod
    def check(cls, config: TrainingConfig, model_config: LatteFlowConfig, layout: BatchLayout) -> None:
        """Reject a micro-batch that cannot be split evenly over the groups, and a time grid that does not fit them."""
        micro, num_groups = layout.micro_batch_size, model_config.num_groups
        if config.groups_per_sample != "all" and micro % num_groups:
            raise UserError(
                f"micro_batch_size: {micro} (global_batch_size {layout.global_batch_size} on {layout.world_size} ranks) is not a "
                f"multiple of the {num_groups} groups that share each micro-batch equally (model.num_groups)"
            )
        with naming("sample."):
            check_sampler(config.sample, model_config)

    @classmethod
    def trained_parameters(cls, model: LatteFlowModel) -> set[str]:
        """Return all but those that no velocity depends on."""
        return {name for name, _ in model.named_parameters()} - model.unreached_parameters()

    @classmethod
    def count(cls, parts: MetaParts) -> Counts:
        """See Objective."""
        return count_flow_matching(parts)

    def __init__(self, parts: RunParts):
        config, model_config, num_prompts = parts.config, parts.components.model_config, len(parts.images.prompts)
        self.device, self.ranks = parts.device, parts.ranks
        self.codec = parts.components.codec.to(parts.device)
        self.prompts, self.contexts = _read_prompts(parts)
        self.grid = SampleGrid(config.sample, self.codec, self.contexts, self.prompts, num_prompts, parts.ranks)
        self.samples = FlowMatchingSamples(
            parts.images,
            model_config.timestep_experts(),
            latent_shape=(model_config.latent_channels, *model_config.latent_size),
            seed=config.seed,
            condition_drop=config.data.condition_drop,
            null_row=num_prompts,
            horizontal_flip=config.data.horizontal_flip,
            groups_per_sample=config.groups_per_sample,
        )
        self.partition = model_config.num_groups, config.logging.timestep_bins
        self.metric_names = loss_names(*self.partition)

    def compute_losses(self, engine, batch: FlowMatchingBatch) -> Tensor:
        """Return the loss of each row, [rows]."""
        with torch.no_grad():
            latents = batch.latents
            if latents is None:
                assert batch.images is not None, "a batch holds images or latents"
                latents = self.codec.encode(batch.images)
            data = latents.float()[batch.image_rows]
        noisy = interpolate(data, batch.noise, batch.timesteps)
        context, inputs = None, None
        if self.contexts is not None:
            context, rows = self.contexts.lookup(batch.context_rows)
        else:
            tokens, rows = self.prompts.lookup(batch.context_rows)
            inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tokens.items()}
        velocity = engine(
            noisy,
            batch.timesteps,
            context=context,
            context_rows=rows.to(self.device, non_blocking=True),
            prompt_inputs=inputs,
        )
        return flow_matching_loss(velocity, data, batch.noise)

    def metric_columns(self, batch: FlowMatchingBatch) -> Tensor:
        """Return the columns of each row's group and bin of tau, [2, rows]."""
        return loss_columns(batch.groups, batch.timesteps, *self.partition)

    @torch.no_grad()
    def log(self, engine, writer: MetricsWriter | None, step: int) -> None:
        """Log the gates over tau. On all ranks: under ZeRO-3 running a module gathers its weights."""
        timesteps = torch.linspace(NUM_TRAIN_TIMESTEPS, 0, 21, device=self.device)
        gates = self.ranks.gather_heads(engine.module.gate_values(timesteps))
        if writer:
            writer.distributions(step, {f"gate/layer_{layer:02d}": values for layer, values in gates.items()})

    def draw(self, engine, writer: MetricsWriter | None, step: int) -> None:
        """Draw the sample grid."""
        grid = self.grid.draw(engine)
        if writer:
            writer.grid(step, grid)


def _read_prompts(parts: RunParts) -> tuple[PromptTokens, ContextSource | None]:
    """Return the prompts of the data, with the null prompt last, and the source of their context; None for a trained VLM.

    Collective.

    Raises:
        UserError: when the context of the prompts does not fit into the configured memory.
    """
    config, components, ranks = parts.config, parts.components, parts.ranks
    limit = config.data.max_prompt_tokens
    texts, null_prompt = parts.images.prompts, config.data.null_prompt
    prompts = PromptTokens(components.tokenizer, texts, null_prompt=null_prompt, max_tokens=limit)
    if prompts.truncated:
        print_once(
            f"data.max_prompt_tokens: {prompts.truncated} of {len(prompts)} prompts are truncated to {limit} tokens"
        )
    elif len(prompts) > FEW_PROMPTS:
        print_once(
            f"data.max_prompt_tokens: {len(prompts)} prompts are padded to {prompts.length} tokens, longer ones truncated"
        )
    if components.model_config.variant == "blend":
        return prompts, None
    vlm, projection = ranks.split_frozen(components.vlm).to(parts.device), components.model_config.context_projection
    encoder = PromptEncoder(vlm, prompts, projection, compute_dtype(config))
    batch_prompts = max(parts.layout.micro_batch_size, samples_per_rank(config.sample, ranks) + 1)
    return prompts, open_context_source(config.vlm, encoder, batch_prompts=batch_prompts)
