"""Reads and writes the state of DeepSpeed's ZeRO optimizers (stages 1 to 3).

This module uses DeepSpeed internals, whose names may change between versions. All other code goes through the engine.
"""

import hashlib
import json
from collections.abc import Iterable

import torch
import torch.distributed as dist
from deepspeed.checkpoint import constants
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from latte_flow.model.tensor_split import split_by_columns, split_by_rows


def master_shards(zero) -> list[Tensor]:
    """Return this rank's flat float32 shards of the master weights, which the base optimizer updates."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


@torch.no_grad()
def refresh_model_weights(zero) -> None:
    """Update the model's weights from the master shards, as DeepSpeed does after an optimizer step. Collective."""
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero.update_lp_params()
        return
    # Small (persistent) parameters stay gathered on every rank: they are sharded for the copy and gathered again.
    persistent = zero.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if persistent:
        persistent[0].all_gather(persistent)


def gradient_norms(zero) -> list[tuple[int, Tensor]]:
    """Return (optimizer parameter group index, unclipped norm over all ranks of a part of its gradient) pairs. Collective.

    Call it between backward and step, at a gradient accumulation boundary.
    """
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return [
            (zero.sub_group_to_group_id[i], torch.as_tensor(norm)) for i, norm in enumerate(zero._get_norm_groups())
        ]
    norms = []
    for i, parameters in enumerate(zero.params_in_partition):
        if zero.cpu_offload:
            norm = zero.complete_grad_norm_calculation_for_cpu_offload(parameters)
        else:
            norm = zero.get_grad_norm_direct(zero.averaged_gradients[i], parameters)
        norms.append((i, torch.as_tensor(norm)))
    return norms


def prepare_optimizer_state(zero, keys: Iterable[str], updates: int) -> None:
    """Initialise this rank's base optimizer state with zeros and ``updates`` updates, for ``write_state`` to fill.

    Args:
        zero: DeepSpeed's ZeRO optimizer, before its first step, over a fused AdamW.
        keys: its state tensors of each parameter; empty if there was no update.
        updates: number of updates done.
    """
    keys = list(keys)
    if not keys:
        return
    for shard in master_shards(zero):
        counter = torch.tensor(
            float(updates), device=shard.device
        )  # a fused AdamW keeps its counter on the shard's device
        zero.optimizer.state[shard] = {"step": counter} | {key: torch.zeros_like(shard) for key in keys}
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero._lazy_init_hp_params_optimizer_state()  # links the state to the parameters


def write_state(parameter, value: Tensor, key: str | None = None) -> None:
    """Write this rank's part of a parameter's float32 master weight, or of its optimizer state ``key``.

    Args:
        parameter: a trained parameter of an engine with ZeRO; DeepSpeed adds attributes to it.
        value: the whole value, float32, in the parameter's unsharded shape.
        key: as in ``prepare_optimizer_state``.
    """
    if not hasattr(parameter, "ds_id"):
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        return
    # Stage 3. DeepSpeed's setter of whole values fails if the number of ranks does not divide the parameter's size.
    length, group = parameter.partition_numel(), parameter.ds_process_group
    padded = torch.nn.functional.pad(value.flatten(), (0, length * dist.get_world_size(group) - value.numel()))
    part = padded[length * dist.get_rank(group) :][:length]
    if key is None:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, key)


def holds_part(parameter) -> bool:
    """Return whether this rank's shard holds a part of a trained parameter, for ``write_state`` to write."""
    return hasattr(parameter, "ds_id") or parameter._hp_mapping is not None


def layout(engine) -> str:
    """Return a digest of how an engine shards the trained state; shards with an equal layout are read without resharding.

    It changes with the number of ranks and the kind of stage, and with DeepSpeed options that order or align parameters.
    """
    zero = engine.optimizer
    order = [[[name, list(shape)] for name, shape in group.items()] for group in engine._get_zero_param_shapes()]
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        cut = [shard.numel() for shard in master_shards(zero)]
    else:
        cut = [zero.partition_size, zero.round_robin_bit16_padding]
    content = json.dumps([dist.get_world_size(), engine.zero_optimization_stage() == 3, order, cut])
    return hashlib.sha256(content.encode()).hexdigest()


def mark_universal(model: torch.nn.Module, tensor_parallel: int = 1) -> None:
    """Make DeepSpeed mark checkpoints as convertible by its ds_to_universal, which requires that for stages 1 and 2.

    Args:
        model: the network, or a rank's part of it with ``tensor_parallel``.
        tensor_parallel: number of ranks that share a network. By default ds_to_universal joins parameters by rows.
    """
    info = {constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
    if tensor_parallel > 1:
        info[constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS] = [rf"(?:{split_by_columns()})$"]
        # Replicated parameters are averaged, which changes them at most by rounding (model/tensor_split.py).
        info[constants.PARAMETER_TO_AVERAGE_PATTERNS] = [rf"(?!(?:{split_by_rows()}|{split_by_columns()})$)"]
    setattr(model, constants.UNIVERSAL_CHECKPOINT_INFO, info)
