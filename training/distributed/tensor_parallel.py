"""Tensor parallelism by megatron-core: its process groups, and its linears in the places that model/partition.py names.

A layer's projections to heads and hidden units are split by outputs (ColumnParallelLinear), the ones back by inputs
(RowParallelLinear, which adds the ranks' outputs up). In between a rank computes its own heads and units and needs no other.
Whatever goes into a ColumnParallelLinear is the same on all ranks and gets its whole gradient on all ranks; so do the parameters
that are not split, which hence stay the same bits on all ranks without anybody comparing them.
"""

import copy
import warnings
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.partition import partition_dim, take_part

with warnings.catch_warnings():
    # One warning a module that Transformer Engine and Apex, which are not used, are not there.
    warnings.simplefilter("ignore", UserWarning)
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        set_tensor_model_parallel_attributes,
    )


def initialize(size: int, patience: timedelta) -> None:
    """Make megatron-core's process groups. Collective.

    Args:
        size: of a set of consecutive ranks that hold one network; it divides the number of ranks.
        patience: how long a collective may take.
    """
    minutes = patience.total_seconds() / 60
    parallel_state.initialize_model_parallel(
        size, distributed_timeout_minutes=minutes, create_gloo_process_groups=False
    )


class ModelParallelUnit:
    """What DeepSpeed asks of its ``mpu``, answered by megatron-core's parallel_state: the model is parallel in tensors alone.

    DeepSpeed reduces gradients and cuts optimizer states over the data-parallel group, and adds the squares of a gradient's norm
    over the model-parallel group: of parameters marked ``tensor_model_parallel`` each rank's, of all others rank 0's.
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
    """Makes of megatron-core's linears what nn.Linear is: one output, and a state dict of weight and bias alone."""

    get_extra_state = nn.Module.get_extra_state  # theirs puts an entry that is None into every state dict

    def forward(self, x: Tensor) -> Tensor:
        output, _ = super().forward(x)  # type: ignore[misc]  # of the linear it is mixed into; the second is a bias that is not added yet: never asked for
        return output


class _Column(_OnlyOutput, ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            # megatron-core would compute the input's gradient all the same, and sum it over the ranks: of a frozen VLM's context,
            # which may be longer than the image.
            return nn.functional.linear(x, self.weight, self.bias)
        return super().forward(x)


class _Row(_OnlyOutput, RowParallelLinear):
    pass


def _parallel_linear(name: str, whole: nn.Linear) -> nn.Module:
    """Return this rank's part of a linear, with the same weights."""
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
    # megatron-core marks a weight when it initialises it. Unmarked, DeepSpeed would count rank 0's part of its gradient alone.
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
    """Leave this rank its part of a whole network on the CPU, the same on all ranks; names stay what they are."""
    model.replace_linears(_parts(model))


def split_frozen(vlm: nn.Module) -> nn.Module:
    """Return this rank's part of a frozen VLM. It shares all that is not split with the VLM, which stays whole."""
    part = copy.deepcopy(vlm, memo={id(parameter): parameter for parameter in vlm.parameters()})
    for name, linear in _parts(vlm).items():
        part.set_submodule(name, linear, strict=True)
    return part


def gather_heads(values: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return, for every layer, what each rank has of its own heads [B, H / ranks] as a whole, [B, H]. Collective."""
    group, size = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    whole = {}
    for layer, own in values.items():
        # Not megatron-core's gather_from_tensor_model_parallel_region: it puts its result on a CUDA device, even where none is.
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, own.contiguous(), group)
        whole[layer] = torch.cat(parts, dim=-1)
    return whole
