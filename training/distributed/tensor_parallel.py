"""Tensor parallelism with megatron-core: its process groups, and its linears in place of those listed in model/tensor_split.py.

A layer's projections to heads and hidden units are split by outputs (ColumnParallelLinear), the projections back by inputs
(RowParallelLinear, which sums the ranks' outputs). In between, each rank computes its own heads and units without communication.
The input of a ColumnParallelLinear is identical on all ranks and receives its full gradient on all ranks. The same holds for
parameters that are not split, which therefore stay bit-identical on all ranks without synchronisation. Norms of single heads are
the exception: each rank applies them to its own heads, and their gradients are added up.
"""

import copy
import warnings
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.tensor_split import is_applied_to_heads, partition_dim, take_part

with warnings.catch_warnings():
    # Each module warns that Transformer Engine and Apex, which are not used, are missing.
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        set_tensor_model_parallel_attributes,
    )


def initialize(size: int, patience: timedelta) -> None:
    """Create megatron-core's process groups. Collective.

    Args:
        size: number of consecutive ranks that share one network; divides the number of ranks.
        patience: timeout of collectives.
    """
    minutes = patience.total_seconds() / 60
    parallel_state.initialize_model_parallel(
        size, distributed_timeout_minutes=minutes, create_gloo_process_groups=False
    )


class ModelParallelUnit:
    """DeepSpeed's ``mpu`` interface over megatron-core's parallel_state: the only model parallelism is tensor parallelism.

    DeepSpeed reduces gradients and shards optimizer states over the data-parallel group, and sums squared gradient norms over the
    model-parallel group: from every rank for parameters marked ``tensor_model_parallel``, from rank 0 only for all others.
    """

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)


class _OnlyOutput:
    """Makes megatron-core's linears behave like nn.Linear: one output, and a state dict of only weight and bias."""

    get_extra_state = nn.Module.get_extra_state  # theirs adds a None entry to every state dict

    def forward(self, x: Tensor) -> Tensor:
        # The second output is a bias to be added later, which is never requested.
        output, _ = super().forward(x)  # type: ignore[misc]  # defined by the linear this is mixed into
        return output


class _Column(_OnlyOutput, ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            # megatron-core would still compute the input's gradient and all-reduce it, here for a frozen VLM's context, which may
            # be longer than the image.
            return nn.functional.linear(x, self.weight, self.bias)
        return super().forward(x)


class _Row(_OnlyOutput, RowParallelLinear):
    pass


def _parallel_linear(name: str, whole: nn.Linear) -> nn.Module:
    """Return this rank's part of a linear, initialised from its weights."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    config = ModelParallelConfig(
        tensor_model_parallel_size=size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=whole.weight.dtype,
    )
    fields = {"config": config, "init_method": nn.init.zeros_, "bias": whole.bias is not None}
    dim = partition_dim(f"{name}.weight")
    if dim == 0:
        part = _Column(whole.in_features, whole.out_features, gather_output=False, **fields)
    else:
        part = _Row(whole.in_features, whole.out_features, input_is_parallel=True, skip_bias_add=False, **fields)
    # megatron-core marks weights only when it initialises them. Unmarked, only rank 0's part would count in the gradient norm.
    set_tensor_model_parallel_attributes(part.weight, True, dim, 1)
    with torch.no_grad():
        for kind, parameter in whole.named_parameters():
            target = part.get_parameter(kind)
            target.copy_(take_part(f"{name}.{kind}", parameter, rank, size))
            target.requires_grad_(parameter.requires_grad)
    return part


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: _parallel_linear(name, linear)
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and partition_dim(f"{name}.weight") is not None
    }


def split_model(model: LatteFlowModel) -> None:
    """Reduce a network on the CPU, identical on all ranks, to this rank's part; parameter names do not change."""
    model.replace_linears(_parts(model))
    for name, parameter in model.named_parameters():
        if is_applied_to_heads(name):
            parameter.register_hook(_sum_over_ranks)


def _sum_over_ranks(gradient: Tensor) -> Tensor:
    """Return the sum of a gradient over the tensor-parallel ranks, of which each has its own heads' part. Collective."""
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total


def split_frozen(vlm: nn.Module) -> nn.Module:
    """Return this rank's part of a frozen VLM. Parameters that are not split are shared with the VLM, which is not changed."""
    part = copy.deepcopy(vlm, memo={id(parameter): parameter for parameter in vlm.parameters()})
    for name, linear in _parts(vlm).items():
        part.set_submodule(name, linear, strict=True)
    return part


def gather_heads(values: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Gather each rank's values of its own heads, [B, H / ranks], into all heads, [B, H], for every layer. Collective."""
    group, size = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    whole = {}
    for layer, own in values.items():
        # Not megatron-core's gather_from_tensor_model_parallel_region: it always allocates its result on a CUDA device.
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, own.contiguous(), group)
        whole[layer] = torch.cat(parts, dim=-1)
    return whole
