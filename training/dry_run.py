"""The cost of a run without running it: parameters, memory per GPU, FLOPs and time, as a table.

Whatever can be counted is not estimated. The real network is built on the meta device, where tensors have shapes but no data,
and runs one micro-batch forward and backward: torch's FlopCounterMode counts its operations, and hooks on the autograd graph
count the bytes kept for the backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latte_flow.model.activation_checkpointing import checkpoint_activations, recomputed_layers
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.tensor_split import partition_dim
from latte_flow.training.components import MetaComponents, build_meta_components, compute_dtype
from latte_flow.training.configs.deepspeed import FLOAT32, load_deepspeed_config, zero_settings
from latte_flow.training.configs.fields import Assumptions, TrainingConfig
from latte_flow.training.distributed.batch_layout import BatchLayout, make_batch_layout
from latte_flow.training.distributed.ranks import data_parallel_size
from latte_flow.training.doctor import examine, facts_of
from latte_flow.training.errors import UserError
from latte_flow.training.objectives.base import Counts, MetaParts, find_objectives, freeze_unreached
from latte_flow.training.optimizer import BYTES_PER_PARAMETER

META = torch.device("meta")
GIB = 2**30
OPTIMIZER = "optimizer (master weights, moments, average)"
USABLE = 0.9
"""Part of a GPU's memory that the counts may take. The rest is for transient buffers, CUDA and fragmentation."""
RANKS_PER_NODE = 8


@dataclass(frozen=True)
class DryRun:
    """The counts of a run, each under the label that the table shows.

    With several objectives, the labels of what each has of its own end in its name.

    Attributes:
        parameters: numbers over all ranks.
        memory: bytes per GPU.
        host: bytes of host memory per rank.
        flops: operations per sample over all GPUs that train it, and those of all prompts.
        zero_stage: of DeepSpeed's configuration.
        layout: the batch over the ranks.
        notes: remarks on the batch.
        seconds: duration of the run under the assumptions.
        warnings: of what the config doctor would change (doctor.py).
    """

    parameters: dict[str, float]
    memory: dict[str, float]
    host: dict[str, float]
    flops: dict[str, float]
    zero_stage: int
    layout: BatchLayout
    notes: list[str]
    seconds: float
    warnings: list[str]

    @property
    def gib(self) -> float:
        """GiB per GPU in all."""
        return sum(self.memory.values()) / GIB


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

    def keep_arguments(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of a layer that is run again: checkpointing keeps its arguments, most of them unseen by autograd."""
        for tensor in _tensors((args, kwargs)):
            self._pack(tensor)

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


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) or is_dataclass(value):
        parts = vars(value) if is_dataclass(value) else value
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from _tensors(part)


def dry_run(config: TrainingConfig, assumed: Assumptions) -> DryRun:
    """Build a run's networks on the meta device and count the memory and operations of one rank.

    With a tiny VLM the prompts are read from the data; otherwise their number and length come from the assumptions.

    Args:
        config: the run.
        assumed: what cannot be counted.

    Raises:
        UserError: in the same cases as the run itself.
    """
    kinds = find_objectives(config)
    components = build_meta_components(config)
    if (prompts := components.prompts) is not None:
        assumed = replace(assumed, num_prompts=len(prompts), prompt_tokens=prompts.length)
    data_size = data_parallel_size(config.tensor_parallel, assumed.gpus)
    layout = make_batch_layout(config, world_size=data_size, rank=0)
    for kind in kinds.values():
        kind.check(config, components.model_config, layout)
    ds_config = load_deepspeed_config(config, layout)
    zero = zero_settings(ds_config)
    model, vlm = _build_networks(config, components)
    freeze_unreached(model, kinds.values())
    parameters = count_parameters(model, vlm)
    facts = facts_of(model, {name: p.numel() for name, p in model.named_parameters()})
    host = count_host_memory(config, components, model)
    _split_over_ranks(config.tensor_parallel, model, vlm)
    parts = MetaParts(config, components, model, vlm, layout, assumed)
    memory = count_model_memory(config, model, layout, ds_config)
    if zero.offload_optimizer is not None and zero.offload_optimizer.device != OffloadDeviceEnum.none:
        host["offloaded optimizer"], memory[OPTIMIZER] = memory[OPTIMIZER], 0
    operations, notes = 0.0, []
    flops: dict[str, float] = {}
    for name, kind in kinds.items():
        counts, suffix = kind.count(parts), f", {name}" if len(kinds) > 1 else ""
        own_memory, own_flops, recurring = count_objective(config, model, counts, layout)
        memory |= {label + suffix: value for label, value in own_memory.items()}
        flops |= {label + suffix: value for label, value in own_flops.items()}
        operations += recurring
        notes += [counts.note] if counts.note else []
    rate = data_size * config.tensor_parallel * assumed.peak_tflops * 1e12 * assumed.utilisation
    seconds = operations * config.global_batch_size * config.max_steps / rate
    warnings = examine(config, replace(facts, seconds_per_step=seconds / config.max_steps))
    return DryRun(parameters, memory, host, flops, zero.stage, layout, notes, seconds, warnings)


def _build_networks(config: TrainingConfig, components: MetaComponents) -> tuple[LatteFlowModel, nn.Module]:
    """Return the network and its VLM (part of the network in a Blend) on the meta device, in the compute dtype."""
    with META:
        model = LatteFlowModel(components.model_config)
    vlm: nn.Module = model.vlm if components.model_config.variant == "blend" else components.vlm
    networks: list[nn.Module] = [model, vlm]
    for network in networks:
        network.to(compute_dtype(config))
    return model, vlm


def count_parameters(model: LatteFlowModel, vlm: nn.Module) -> dict[str, float]:
    """Count the parameters of a whole network and its VLM."""
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vlm."))
    return {
        "generation path (layers, embeddings, head)": own,
        "VLM": sum(p.numel() for p in vlm.parameters()),
        "trained": _trained(model),
        "run at one sampling step": model.activated_parameters(),
    }


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


def count_objective(
    config: TrainingConfig, model: LatteFlowModel, counts: Counts, layout: BatchLayout
) -> tuple[dict[str, float], dict[str, float], float]:
    """Run one micro-batch of an objective forward and backward, and count its cost.

    Returns:
        Bytes on one rank; operations per sample of all tensor-parallel ranks, each of which runs what is not split; the sum of
        those that recur in every step.
    """
    memory: dict[str, float] = {}
    if config.activation_checkpointing:
        memory["activations of the layer that is run again"] = _largest_layer(model, counts)
    checkpoint_activations(model, config.activation_checkpointing)
    with FlopCounterMode(display=False) as counter, SavedBytes(model) as saved:
        hooks = [
            layer.register_forward_pre_hook(saved.keep_arguments, with_kwargs=True)
            for layer in (recomputed_layers(model) if config.activation_checkpointing else [])
        ]
        loss = counts.losses().mean()
        forward, activations = counter.get_total_flops(), saved.total
        loss.backward()
    for hook in hooks:
        hook.remove()
    ranks = config.tensor_parallel
    per_sample = ranks / layout.micro_batch_size
    recurring = {"forward and backward": counter.get_total_flops() * per_sample}
    recurring |= {label: value * ranks for label, value in counts.flops.items()}
    once = {label: value * ranks for label, value in counts.flops_once.items()}
    memory = {"activations kept for the backward pass": activations} | memory | counts.memory
    return memory, {"forward": forward * per_sample} | recurring | once, sum(recurring.values())


def _largest_layer(model: LatteFlowModel, counts: Counts) -> int:
    """Return the most bytes that any one layer keeps without activation checkpointing."""
    checkpoint_activations(model, False)
    before, sizes, hooks = 0, [0], []

    def enter(*_: Any) -> None:
        nonlocal before
        before = saved.total

    with SavedBytes(model) as saved:
        for layer in recomputed_layers(model):
            hooks += [
                layer.register_forward_pre_hook(enter),
                layer.register_forward_hook(lambda *_: sizes.append(saved.total - before)),
            ]
        counts.losses()
    for hook in hooks:
        hook.remove()
    return max(sizes)


def count_model_memory(
    config: TrainingConfig, model: LatteFlowModel, layout: BatchLayout, ds_config: dict
) -> dict[str, float]:
    """Return the bytes of one rank for its part of the network and the optimizer; shards are over the ranks of the layout."""
    zero, shards = zero_settings(ds_config), layout.world_size
    width, trained = compute_dtype(config).itemsize, _trained(model)
    gradient_width = 4 if ds_config.get("data_types", {}).get("grad_accum_dtype") == FLOAT32 else width
    return {
        "weights": sum(p.numel() for p in model.parameters()) * width / (shards if zero.stage == 3 else 1),
        "gradients": trained * gradient_width / (shards if zero.stage >= 2 else 1),
        OPTIMIZER: trained * BYTES_PER_PARAMETER / shards,
        "communication buckets": zero.reduce_bucket_size * (2 if zero.overlap_comm else 1) * width,
    }


def count_host_memory(config: TrainingConfig, components: MetaComponents, model: LatteFlowModel) -> dict[str, float]:
    """Return the bytes of host memory that one rank takes while it builds the whole network, in float32, and loads the VLM.

    Tensor-parallel ranks build their part beside it.
    """
    is_float32 = config.vlm.path is None or config.model.variant == "blend"
    vlm_width = 4 if is_float32 else compute_dtype(config).itemsize
    network = 4 * sum(p.numel() for p in model.parameters())
    vlm = vlm_width * sum(p.numel() for p in components.vlm.parameters())
    parts = network / config.tensor_parallel if config.tensor_parallel > 1 else 0
    return {"building the network": network + vlm + parts}


def _remedies(config: TrainingConfig, assumed: Assumptions, result: DryRun) -> Iterator[tuple[str, float]]:
    """Yield changes that take less memory, each alone, and the GiB per GPU with it; each is counted as a run of its own."""
    changes: list[dict[str, Any]] = [{"micro_batch_size": result.layout.micro_batch_size // 2}]
    if not config.activation_checkpointing:
        changes.append({"activation_checkpointing": True})
    if result.zero_stage < 3 and config.tensor_parallel == 1:
        changes.append({"deepspeed": "ds_configs/zero3.json"})
    changes.append({"tensor_parallel": 2 * config.tensor_parallel})
    for change in changes:
        ((field, value),) = change.items()
        try:
            gib = dry_run(replace(config, **change), assumed).gib
        except UserError:  # this run does not accept it, for example a micro-batch that the groups cannot share
            continue
        if gib < result.gib:
            yield f"--{field} {str(value).lower()}", gib


def format_table(config: TrainingConfig, result: DryRun, assumed: Assumptions) -> str:
    """Return the counts as a readable table. Of a run that does not fit, also what remedies would take, each counted here."""
    layout, memory = result.layout, result.memory | {"total": sum(result.memory.values())}

    def rows(counts: dict[str, float], divisor: float, form: str, unit: str) -> list[str]:
        return [f"  {label:<48} {value / divisor:>{form}} {unit}" for label, value in counts.items()]

    gpus = layout.world_size * config.tensor_parallel
    tensor = f", tensor_parallel {config.tensor_parallel}" if config.tensor_parallel > 1 else ""
    whom = "GPUs" if config.tensor_parallel == 1 else f"sets of {config.tensor_parallel} GPUs"
    samples = config.max_steps * config.global_batch_size
    limit = USABLE * assumed.gpu_gib
    verdict, remedies = "fits", {}
    if result.gib > limit:
        verdict, remedies = "DOES NOT FIT", dict(_remedies(config, assumed, result))
    node = min(RANKS_PER_NODE, gpus)
    lines = [
        "parameters",
        *rows(result.parameters, 1e6, "12,.2f", "M"),
        "",
        f"memory per GPU (ZeRO-{result.zero_stage}, {gpus} GPUs{tensor}, micro-batch {layout.micro_batch_size})",
        *rows(memory, GIB, "12,.3f", "GiB"),
        f"  {verdict} {limit:g} GiB, {USABLE:.0%} of assume.gpu_gib {assumed.gpu_gib:g}"
        + ("; with one of these alone:" if remedies else ""),
        *rows(remedies, 1, "12,.3f", "GiB"),
        "",
        f"host memory per rank, times {node} on a node with {node} of the GPUs",
        *rows(result.host, GIB, "12,.3f", "GiB"),
        "",
        "floating-point operations per sample",
        *rows(result.flops, 1e9, "12,.2f", "GFLOP"),
        "",
        "batch",
        f"  global {layout.global_batch_size} = {layout.world_size} {whom} x micro-batch {layout.micro_batch_size} x "
        + "; ".join([f"{layout.accumulation_steps} accumulation steps", *result.notes]),
        "",
        f"time at {assumed.utilisation:.0%} of {assumed.peak_tflops:g} TFLOP/s per GPU",
        f"  {config.max_steps:,} steps, {samples:,} samples: {result.seconds / 3600:,.2f} hours",
        *(f"\nwarning: {warning}" for warning in result.warnings),
    ]
    return "\n".join(lines)
