"""Take a checkpoint into an engine with other ranks, another ZeRO stage or another tensor_parallel than it was written with.

DeepSpeed's own loading wants the shards cut as they were. Here every parameter is put together by name from the shards (master
weight, moments, moving average) and each rank takes its part of it, so any number of ranks and any stage goes on from any other.
Nothing random is kept in checkpoints (training/data/loader.py), so samples and noise are those of the run before.
"""

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from model.partition import take_part, whole_shape
from training.errors import UserError
from training.zero import holds_part, prepare_optimizer_state, refresh_model_weights, write_state
from training.zero_shards import ZeroShards

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def load_resharded(engine, folder: Path) -> dict:
    """Load weights, optimizer state, moving average and counters into an engine that has not trained yet. Collective.

    Call it inside checkpoint_io.safe_unpickling.

    Args:
        engine: a DeepSpeed engine with ZeRO over an AdamWWithEMA.
        folder: a step's checkpoint.

    Returns:
        What ``CheckpointStore.save`` was given as the client state, among entries of DeepSpeed.

    Raises:
        UserError: when the checkpoint is of another network.
    """
    shards = ZeroShards(folder)
    frozen = shards.frozen()
    # This rank's part of what is split; without tensor parallelism it is the whole.
    rank, size = (0, 1) if engine.mpu is None else (engine.mpu.get_model_parallel_rank(), engine.mp_world_size)
    _check_shapes(folder, shards, {name: tensor.shape for name, tensor in frozen.items()}, engine.module, size)
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    prepare_optimizer_state(engine.optimizer, shards.state_keys, shards.updates)
    for name, parameter in trained.items():
        for key in (None, *shards.state_keys) if holds_part(parameter) else ():
            write_state(parameter, take_part(name, shards.read(name, key), rank, size), key)
    refresh_model_weights(engine.optimizer)
    untrained = {name: take_part(name, tensor, rank, size) for name, tensor in (frozen | shards.buffers()).items()}
    _load_untrained(engine.module, untrained)
    for counter in COUNTERS:
        setattr(engine, counter, shards.model_states[counter])
    return shards.model_states


def _check_shapes(
    folder: Path, shards: ZeroShards, frozen: dict[str, torch.Size], model: torch.nn.Module, tensor_parallel: int
) -> None:
    def describe(shape: torch.Size, trained: bool) -> str:
        return f"{list(shape)} {'trained' if trained else 'frozen'}"

    there = {name: describe(shape, True) for name, shape in shards.shapes.items()}
    there |= {name: describe(shape, False) for name, shape in frozen.items()}
    here = {
        name: describe(whole_shape(name, getattr(p, "ds_shape", p.shape), tensor_parallel), p.requires_grad)
        for name, p in model.named_parameters()
    }
    wrong = [
        f"{name}: {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{folder}: holds the weights of another network ({'; '.join(wrong[:3])}{more})")


@torch.no_grad()
def _load_untrained(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy frozen parameters and buffers."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, value in tensors.items():
        target = parameters[name] if name in parameters else buffers[name]
        # Under stage 3 parameters are sharded; rank 0's copy is what all ranks get.
        with deepspeed.zero.GatheredParameters([target], modifier_rank=0, enabled=hasattr(target, "ds_id")):
            if not hasattr(target, "ds_id") or dist.get_rank() == 0:
                target.copy_(value)
