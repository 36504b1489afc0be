"""The cost of a run without running it: parameters, memory per GPU, FLOPs and time, as a table.

Whatever can be counted is not estimated. The real network is built on the meta device, where tensors have shapes but no data,
and runs one micro-batch forward and backward: torch's FlopCounterMode counts its operations, and hooks on the autograd graph
count the bytes kept for the backward pass.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latte_flow.model.codecs import DCAECodec, LatentCodec
from latte_flow.model.context import Context, encode_context
from latte_flow.model.flow_matching import flow_matching_loss
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.tensor_split import partition_dim
from latte_flow.training.components import MetaComponents, build_meta_components, compute_dtype
from latte_flow.training.configs.deepspeed import deepspeed_file, load_deepspeed_config
from latte_flow.training.configs.fields import Assumptions, TrainingConfig
from latte_flow.training.data.context_cache import context_capacity
from latte_flow.training.distributed.batch_layout import BatchLayout, make_batch_layout
from latte_flow.training.distributed.ranks import data_parallel_size

META = torch.device("meta")
GIB = 2**30
OPTIMIZER_BYTES = 16
"""Bytes per parameter of the float32 master weight, AdamW's two moments and the average; sharded over the ranks."""


Networks = tuple[LatteFlowModel, nn.Module, LatentCodec]
"""The network, its VLM (part of the network in a Blend) and the codec."""


@dataclass(frozen=True)
class Parameters:
    """Parameter counts over all ranks."""

    generation_path: int
    vlm: int
    trained: int
    activated: int  # at one sampling step


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU; None for items a run does not have."""

    weights: float
    gradients: float
    optimizer: float
    communication_buckets: float
    activations: float  # kept by autograd for one micro-batch
    context_cache: float
    frozen_vlm: float | None  # on the device only if not all context is cached
    autoencoder: float | None  # still decodes the sample grids when latents are precomputed

    @property
    def total(self) -> float:
        """Sum of all items in bytes."""
        return sum(value for value in vars(self).values() if value is not None)


@dataclass(frozen=True)
class Flops:
    """Operations per sample over all GPUs that train it (``context``: for all prompts); None for what a run does not do."""

    forward: float
    forward_and_backward: float
    encoding: float | None
    context: float | None


@dataclass(frozen=True)
class DryRun:
    """The counts of a run, and its duration in seconds under the assumptions."""

    parameters: Parameters
    memory: Memory
    flops: Flops
    layout: BatchLayout
    seconds: float


class ContextCount(NamedTuple):
    """The context of all prompts and its cost; empty if the VLM is trained."""

    context: Context | None = None
    flops: float = 0.0
    kept_bytes: int = 0
    is_kept: bool = False  # all of it is cached


class StepCount(NamedTuple):
    """The cost of one micro-batch on one rank."""

    forward_flops: float
    flops: float
    activations: int


class SavedBytes:
    """Counts the bytes of distinct tensors that autograd keeps for the backward pass, excluding parameters."""

    def __init__(self, module: nn.Module):
        self.storages = {p.untyped_storage()._cdata: 0 for p in [*module.parameters(), *module.buffers()]}
        self.kept: list[torch.UntypedStorage] = []  # keeps the storages alive so that no address is reused

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage.nbytes()
            self.kept.append(storage)
        return tensor

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self.storages.values())


def dry_run(config: TrainingConfig, assumed: Assumptions) -> DryRun:
    """Build a run's networks on the meta device and count the memory and operations of one rank.

    With a tiny VLM the prompts are read from the data; otherwise their number and length come from the assumptions.

    Args:
        config: the run.
        assumed: what cannot be counted.

    Raises:
        UserError: in the same cases as the run itself.
    """
    components = build_meta_components(config)
    if components.prompt_ids is not None:
        num_prompts, prompt_tokens = components.prompt_ids.shape
        assumed = replace(assumed, num_prompts=num_prompts, prompt_tokens=prompt_tokens)
    data_size = data_parallel_size(config.tensor_parallel, assumed.gpus)
    layout = make_batch_layout(config, num_groups=components.model_config.num_groups, world_size=data_size, rank=0)
    load_deepspeed_config(config, layout)
    model, vlm, codec = _build_networks(config, components)
    parameters = count_parameters(model, vlm)
    _split_over_ranks(config.tensor_parallel, model, vlm)
    inputs = _prompt_inputs(assumed)
    context = count_context(config, vlm, inputs, layout)
    step = count_step(config, model, inputs, context, layout)
    flops = count_flops(config, codec, context, step, layout)
    memory = count_memory(config, (model, vlm, codec), context, step, layout)
    operations = flops.forward_and_backward + (flops.encoding or 0.0)
    rate = data_size * config.tensor_parallel * assumed.peak_tflops * 1e12 * assumed.utilisation
    seconds = operations * config.global_batch_size * config.max_steps / rate
    return DryRun(parameters, memory, flops, layout, seconds)


def _build_networks(config: TrainingConfig, components: MetaComponents) -> Networks:
    """Return the networks on the meta device, in the compute dtype."""
    with META:
        model = LatteFlowModel(components.model_config)
    vlm: nn.Module = model.vlm if components.model_config.variant == "blend" else components.vlm
    networks: list[nn.Module] = [model, vlm]
    for network in networks:
        network.to(compute_dtype(config))
    model.freeze_unreached_parameters()
    return model, vlm, components.codec


def count_parameters(model: LatteFlowModel, vlm: nn.Module) -> Parameters:
    """Count the parameters of a whole network and its VLM."""
    return Parameters(
        generation_path=sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vlm.")),
        vlm=sum(p.numel() for p in vlm.parameters()),
        trained=_trained(model),
        activated=model.activated_parameters(),
    )


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _split_over_ranks(tensor_parallel: int, model: LatteFlowModel, vlm: nn.Module) -> None:
    """Reduce both networks to the part that one tensor-parallel rank holds."""
    if tensor_parallel > 1:
        model.replace_linears(_linears_of_one_rank(model, tensor_parallel))
        for name, linear in _linears_of_one_rank(vlm, tensor_parallel).items():  # a Blend's VLM has none left
            vlm.set_submodule(name, linear, strict=True)


def _linears_of_one_rank(network: nn.Module, tensor_parallel: int) -> dict[str, nn.Linear]:
    """Return one tensor-parallel rank's shards of a network's split linears by name, on the meta device."""
    parts = {}
    for name, linear in network.named_modules():
        dim = partition_dim(f"{name}.weight")
        if isinstance(linear, nn.Linear) and dim is not None:
            sizes = list(linear.weight.shape)
            sizes[dim] //= tensor_parallel
            part = nn.Linear(sizes[1], sizes[0], linear.bias is not None, device=META, dtype=linear.weight.dtype)
            parts[name] = part.requires_grad_(linear.weight.requires_grad)
    return parts


def _prompt_inputs(assumed: Assumptions) -> dict[str, Tensor]:
    """Return the tokens of all prompts on the meta device."""
    shape = (assumed.num_prompts, assumed.prompt_tokens)
    return {
        "input_ids": torch.empty(shape, dtype=torch.long, device=META),
        "attention_mask": torch.ones(shape, dtype=torch.long, device=META),
    }


def count_context(
    config: TrainingConfig, vlm: nn.Module, inputs: dict[str, Tensor], layout: BatchLayout
) -> ContextCount:
    """Run a frozen VLM over all prompts and count its cost.

    Raises:
        UserError: when the context does not fit into the configured memory.
    """
    if config.model.variant == "blend":
        return ContextCount()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        context = encode_context(vlm, inputs, config.model.context_projection)
    num_prompts = len(inputs["input_ids"])
    bytes_per_prompt = context.num_bytes // num_prompts
    kept = context_capacity(
        config.vlm.context_cache,
        num_prompts=num_prompts,
        bytes_per_prompt=bytes_per_prompt,
        budget=config.vlm.context_cache_gib * GIB,
        batch_prompts=layout.micro_batch_size,
    )
    return ContextCount(context, counter.get_total_flops(), kept * bytes_per_prompt, kept == num_prompts)


def count_step(
    config: TrainingConfig,
    model: LatteFlowModel,
    inputs: dict[str, Tensor],
    context: ContextCount,
    layout: BatchLayout,
) -> StepCount:
    """Run one micro-batch forward and backward through a rank's part of the network and count its cost."""
    groups_of_a_sample = model.config.num_groups if config.groups_per_sample == "all" else 1
    rows = layout.micro_batch_size * groups_of_a_sample
    latents = torch.empty(rows, model.config.latent_channels, *model.config.latent_size, device=META)
    with FlopCounterMode(display=False) as counter, SavedBytes(model) as saved:
        velocity = model(
            latents,
            torch.empty(rows, device=META),
            context=context.context,
            context_rows=torch.empty(rows, dtype=torch.long, device=META),
            prompt_inputs=inputs if context.context is None else None,
        )
        loss = flow_matching_loss(velocity, latents, latents).mean()
        forward_flops, activations = counter.get_total_flops(), saved.total
        loss.backward()
    return StepCount(forward_flops, counter.get_total_flops(), activations)


def count_flops(
    config: TrainingConfig, codec: LatentCodec, context: ContextCount, step: StepCount, layout: BatchLayout
) -> Flops:
    """Return the operations per sample summed over the tensor-parallel ranks; what is not split runs on each of them."""
    ranks, encoding = config.tensor_parallel, None
    if isinstance(codec, DCAECodec) and config.data.dataset != "latents":
        side = config.data.resolution
        with FlopCounterMode(display=False) as counter:
            codec.encode(torch.empty(1, codec.image_channels, side, side, device=META))
        encoding = counter.get_total_flops() * ranks
    return Flops(
        forward=step.forward_flops * ranks / layout.micro_batch_size,
        forward_and_backward=step.flops * ranks / layout.micro_batch_size,
        encoding=encoding,
        context=None if context.context is None else context.flops * ranks,
    )


def count_memory(
    config: TrainingConfig, networks: Networks, context: ContextCount, step: StepCount, layout: BatchLayout
) -> Memory:
    """Return the bytes of one rank that holds these parts of the networks; shards are over the ranks of the layout."""
    (model, vlm, codec), zero = networks, _zero_settings(config)
    shards, width, trained = layout.world_size, compute_dtype(config).itemsize, _trained(model)

    def size(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters()) * width

    return Memory(
        weights=size(model) / (shards if zero["stage"] == 3 else 1),
        gradients=trained * width / (shards if zero["stage"] >= 2 else 1),
        optimizer=0 if zero["offload"] else trained * OPTIMIZER_BYTES / shards,
        communication_buckets=zero["buckets"] * width,
        activations=step.activations,
        context_cache=context.kept_bytes,
        frozen_vlm=None if context.context is None or context.is_kept else size(vlm),
        autoencoder=size(codec) if isinstance(codec, DCAECodec) else None,
    )


def _zero_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings of DeepSpeed's configuration that affect memory; buckets: their size in elements."""
    zero = json.loads(deepspeed_file(config).read_text()).get("zero_optimization", {})
    buckets = zero.get("reduce_bucket_size", 5e8) * (2 if zero.get("overlap_comm", False) else 1)
    return {"stage": zero.get("stage", 0), "buckets": buckets, "offload": bool(zero.get("offload_optimizer"))}


TEXTS = {
    "generation_path": "generation path (layers, embeddings, head)",
    "vlm": "VLM",
    "activated": "run at one sampling step",
    "optimizer": "optimizer (master weights, moments, average)",
    "activations": "activations kept for the backward pass",
    "frozen_vlm": "frozen VLM",
    "encoding": "encoding the image",
}
"""Labels in the table for counts whose field name is not clear enough."""


def format_table(config: TrainingConfig, result: DryRun, assumed: Assumptions) -> str:
    """Return the counts as a readable table."""
    layout, memory = result.layout, vars(result.memory) | {"total": result.memory.total}
    when = "once per run" if result.memory.frozen_vlm is None else "each time they are not in the cache"
    texts = TEXTS | {"context": f"context of all prompts, {when}"}

    def rows(counts: dict[str, float | None], divisor: float, form: str, unit: str) -> list[str]:
        held = {texts.get(name, name.replace("_", " ")): value for name, value in counts.items() if value is not None}
        return [f"  {text:<48} {value / divisor:>{form}} {unit}" for text, value in held.items()]

    gpus = layout.world_size * config.tensor_parallel
    tensor = f", tensor_parallel {config.tensor_parallel}" if config.tensor_parallel > 1 else ""
    whom = "GPUs" if config.tensor_parallel == 1 else f"sets of {config.tensor_parallel} GPUs"
    shares = 1 if config.groups_per_sample == "all" else config.model.num_groups
    samples = config.max_steps * config.global_batch_size
    lines = [
        "parameters",
        *rows(vars(result.parameters), 1e6, "12,.2f", "M"),
        "",
        f"memory per GPU (ZeRO-{_zero_settings(config)['stage']}, {gpus} GPUs{tensor}, micro-batch {layout.micro_batch_size})",
        *rows(memory, GIB, "12,.3f", "GiB"),
        "",
        "floating-point operations per sample",
        *rows(vars(result.flops), 1e9, "12,.2f", "GFLOP"),
        "",
        "batch",
        f"  global {layout.global_batch_size} = {layout.world_size} {whom} x micro-batch {layout.micro_batch_size} x "
        f"{layout.accumulation_steps} accumulation steps; each group sees {layout.global_batch_size // shares} samples per step",
        "",
        f"time at {assumed.utilisation:.0%} of {assumed.peak_tflops:g} TFLOP/s per GPU",
        f"  {config.max_steps:,} steps, {samples:,} samples: {result.seconds / 3600:,.2f} hours",
    ]
    return "\n".join(lines)
