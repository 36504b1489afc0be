"""What the dry run counts of flow matching: a micro-batch, the context of the prompts, the frozen VLM and the autoencoder."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from latte_flow.model.context import Context, encode_context
from latte_flow.model.flow_matching import flow_matching_loss
from latte_flow.training.components import compute_dtype
from latte_flow.training.data.context_cache import context_capacity
from latte_flow.training.data.sources import find_source
from latte_flow.training.objectives.base import Counts, MetaParts

META = torch.device("meta")


class ContextCount(NamedTuple):
    """The context of all prompts and its cost; empty if the VLM is trained."""

    context: Context | None = None
    flops: float = 0.0
    kept_bytes: int = 0
    is_kept: bool = False  # all of it is cached


def count_flow_matching(parts: MetaParts) -> Counts:
    """Return the counts of one rank.

    Raises:
        UserError: when the context does not fit into the configured memory.
    """
    config, codec, layout, width = (
        parts.config,
        parts.components.codec,
        parts.layout,
        compute_dtype(parts.config).itemsize,
    )
    shape = (parts.assumed.num_prompts, parts.assumed.prompt_tokens)
    prompts = {
        "input_ids": torch.empty(shape, dtype=torch.long, device=META),
        "attention_mask": torch.ones(shape, dtype=torch.long, device=META),
    }
    context = _count_context(parts, prompts)
    memory: dict[str, float] = {"context cache": context.kept_bytes}
    flops, flops_once = {}, {}
    if context.context is not None:
        when = "once per run" if context.is_kept else "each time they are not in the cache"
        flops_once[f"context of all prompts, {when}"] = context.flops
        if not context.is_kept:
            memory["frozen VLM"] = sum(p.numel() for p in parts.vlm.parameters()) * width
    if codec.has_weights:  # also decodes the sample grids of a run on latents
        memory["autoencoder"] = sum(p.numel() for p in codec.parameters()) * width
        if not find_source(config.data.dataset).encoded:
            side = config.data.resolution
            with FlopCounterMode(display=False) as counter:
                codec.encode(torch.empty(1, codec.image_channels, side, side, device=META))
            flops["encoding the image"] = counter.get_total_flops()
    share = layout.global_batch_size // (1 if config.groups_per_sample == "all" else config.model.num_groups)
    return Counts(
        losses=lambda: _run_micro_batch(parts, prompts, context.context),
        memory=memory,
        flops=flops,
        flops_once=flops_once,
        note=f"each group sees {share} samples per step",
    )


def _count_context(parts: MetaParts, prompts: dict[str, Tensor]) -> ContextCount:
    """Run a frozen VLM over all prompts and count its cost."""
    config = parts.config
    if config.model.variant == "blend":
        return ContextCount()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        context = encode_context(parts.vlm, prompts, config.model.context_projection)
    num_prompts = len(prompts["input_ids"])
    bytes_per_prompt = context.num_bytes // num_prompts
    kept = context_capacity(
        config.vlm.context_cache,
        num_prompts=num_prompts,
        bytes_per_prompt=bytes_per_prompt,
        budget=config.vlm.context_cache_gib * 2**30,
        batch_prompts=parts.layout.micro_batch_size,
    )
    return ContextCount(context, counter.get_total_flops(), kept * bytes_per_prompt, kept == num_prompts)


def _run_micro_batch(parts: MetaParts, prompts: dict[str, Tensor], context: Context | None) -> Tensor:
    """Return the losses [rows] of one micro-batch."""
    model_config = parts.components.model_config
    rows = parts.layout.micro_batch_size * (model_config.num_groups if parts.config.groups_per_sample == "all" else 1)
    latents = torch.empty(rows, model_config.latent_channels, *model_config.latent_size, device=META)
    velocity = parts.model(
        latents,
        torch.empty(rows, device=META),
        context=context,
        context_rows=torch.empty(rows, dtype=torch.long, device=META),
        prompt_inputs={name: tokens[:rows] for name, tokens in prompts.items()} if context is None else None,
    )
    return flow_matching_loss(velocity, latents, latents)
