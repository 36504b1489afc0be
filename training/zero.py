"""What the trainer reads and writes of DeepSpeed's ZeRO optimizers (stages 1 to 3), in one place.

These are DeepSpeed's internals: names that a new version may change. Everything else of the project goes through the engine.
"""

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor


def master_shards(zero) -> list[Tensor]:
    """Return this rank's flat float32 shards of the master weights: the tensors that the base optimizer updates."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


@torch.no_grad()
def refresh_model_weights(zero) -> None:
    """Give the model the weights of the master shards, as DeepSpeed does after an optimizer step. Collective."""
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero.update_lp_params()
        return
    # Parameters too small to be worth sharding stay gathered on every rank: they are sharded for the copy, and gathered again.
    persistent = zero.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if persistent:
        persistent[0].all_gather(persistent)


def gradient_norms(zero) -> list[tuple[int, Tensor]]:
    """Return (index of the optimizer's parameter group, norm of a part of its gradient over all ranks, not clipped). Collective.

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
