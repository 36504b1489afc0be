"""The fixed-seed sample grid drawn during training."""

import numpy as np
import torch
import torch.distributed as dist

from latte_flow.model.codecs import LatentCodec
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.images import grid_scale, make_grid, to_uint8
from latte_flow.model.sampling import image_seeds, initial_noise, sample_latents
from latte_flow.model.time_grids import make_timesteps
from latte_flow.training.configs.fields import SampleConfig
from latte_flow.training.data.context_cache import ContextSource
from latte_flow.training.data.prompts import PromptTokens
from latte_flow.training.distributed.ranks import Ranks
from latte_flow.training.optimizer import ema_weights


def samples_per_rank(config: SampleConfig, ranks: Ranks) -> int:
    """Return how many images of a grid each rank draws: equal shares, so that all ranks run the modules equally often."""
    return -(-config.num_images // ranks.data_size)


def grid_options(config: SampleConfig) -> dict:
    """Return the arguments of model.time_grids.make_timesteps."""
    names = ("num_steps", "time_grid", "shift", "align_to_experts", "allow_skipped_experts")
    return {name: getattr(config, name) for name in names}


def check_sampler(config: SampleConfig, model_config: LatteFlowConfig) -> None:
    """Check the time grid of a run that draws sample grids.

    Raises:
        ValueError: names the field, and what is accepted.
    """
    if config.every:
        make_timesteps(model_config.timestep_experts(), model_config.num_image_tokens, **grid_options(config))


class SampleGrid:
    """Draws the same images every time, so that grids of different steps are comparable.

    Args:
        config: number of images and sampler settings.
        codec: codec of the run.
        contexts: source of the prompts' context for a frozen VLM; None for a trained one.
        prompts: the prompts' tokens, for a trained VLM.
        num_prompts: rows 0 .. num_prompts - 1 are the prompts that the images cycle through; the next row is the null prompt.
        ranks: which rank draws which share; tensor-parallel ranks draw the same images together.
    """

    def __init__(
        self,
        config: SampleConfig,
        codec: LatentCodec,
        contexts: ContextSource | None,
        prompts: PromptTokens,
        num_prompts: int,
        ranks: Ranks,
    ):
        self.config, self.codec = config, codec
        self.contexts, self.prompts, self.num_prompts = contexts, prompts, num_prompts
        self.ranks = ranks

    def draw(self, engine) -> np.ndarray:
        """Sample with the averaged weights of a DeepSpeed engine, each rank its share. Collective.

        Returns:
            One image, uint8 [height, width] or [height, width, 3].
        """
        model, config = engine.module, self.config
        share = samples_per_rank(config, self.ranks)
        first = self.ranks.data_rank * share
        rows = torch.cat([torch.arange(first, first + share) % self.num_prompts, torch.tensor([self.num_prompts])])
        latent_shape = (model.config.latent_channels, *model.config.latent_size)
        with ema_weights(engine), torch.no_grad():
            if self.contexts is not None:
                context, rows = self.contexts.lookup(rows)
            else:
                distinct, rows = torch.unique(rows, return_inverse=True)
                inputs = {n: t.to(engine.device) for n, t in self.prompts.tokens(distinct.tolist()).items()}
                context, rows = model.encode_context(inputs), rows.to(engine.device)
            seeds = image_seeds(config.seed, first, share)
            latents = sample_latents(
                model,
                initial_noise(seeds, latent_shape),
                context.gather(rows[:-1]),
                context.gather(rows[-1:]),
                cfg_scale=config.cfg_scale,
                solver=config.solver,
                seeds=seeds,
                **grid_options(config),
            )
        images = self.codec.decode(latents).float().contiguous()
        parts = [torch.empty_like(images) for _ in range(self.ranks.data_size)]
        dist.all_gather(parts, images, self.ranks.data_group)
        pixels = to_uint8(torch.cat(parts)[: config.num_images])
        columns = min(10 if self.num_prompts % 10 == 0 else 8, len(pixels))
        return make_grid(list(pixels), columns, scale=grid_scale(images.shape[-1]))
