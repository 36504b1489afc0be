"""Elastic loading: resumes a checkpoint with a different number of ranks, ZeRO stage or tensor_parallel than it was written with.

DeepSpeed's own loading requires an unchanged sharding. Here every parameter (master weight, moments, moving average) is assembled
by name from the shards and each rank takes its part, so any number of ranks and any stage can resume from any other.
Checkpoints hold no random state (training/data/loader.py), so samples and noise are unchanged.
"""

from collections.abc import Mapping

import deepspeed
import torch
import torch.distributed as dist

from latte_flow.model.tensor_split import take_part, whole_shape
from latte_flow.training.checkpoint.formats.source import MODEL, WeightSource
from latte_flow.training.distributed.zero import holds_part, prepare_optimizer_state, refresh_model_weights, write_state
from latte_flow.training.errors import UserError

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def load_resharded(engine, source: WeightSource) -> dict:
    """Load weights, optimizer state, moving average and counters into an engine that has not trained yet. Collective.

    Args:
        engine: a DeepSpeed engine with ZeRO over an AdamWWithEMA.
        source: a checkpoint in a format that holds the optimizer state.

    Returns:
        The client state passed to ``CheckpointStore.save``, along with DeepSpeed's own entries.

    Raises:
        UserError: when the checkpoint belongs to another network.
    """
    state = source.training_state
    assert state is not None  # callers only open formats that have one
    infos = source.tensors
    untrained = {name: source.read(name) for name in infos if name not in state.shapes}
    rank, size = _tensor_parallel(engine)
    _check_shapes(source, state.shapes, engine.module, size)
    prepare_optimizer_state(engine.optimizer, state.state_keys, state.updates)
    for name, parameter in _trained(engine).items():
        for key in (None, *state.state_keys) if holds_part(parameter) else ():
            write_state(parameter, take_part(name, source.read(name, key or MODEL), rank, size), key)
    refresh_model_weights(engine.optimizer)
    _load_untrained(engine.module, {name: take_part(name, t, rank, size) for name, t in untrained.items()})
    for counter in COUNTERS:
        setattr(engine, counter, state.model_states[counter])
    return state.model_states


def write_master_weights(engine, source: WeightSource, kind: str, names: Mapping[str, str]) -> None:
    """Write float32 master weights, which DeepSpeed made from a network rounded to its compute dtype. Collective.

    Args:
        engine: as in ``load_resharded``.
        source: weights of the same network.
        kind: the kind of weights to read.
        names: name in the network -> name in the source.
    """
    rank, size = _tensor_parallel(engine)
    for name, parameter in _trained(engine).items():
        if holds_part(parameter):
            write_state(parameter, take_part(name, source.read(names[name], kind).float(), rank, size))
    refresh_model_weights(engine.optimizer)


def _trained(engine) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def _tensor_parallel(engine) -> tuple[int, int]:
    """Return which part of split parameters this rank holds, and of how many."""
    return (0, 1) if engine.mpu is None else (engine.mpu.get_model_parallel_rank(), engine.mp_world_size)


def _check_shapes(
    source: WeightSource, trained: Mapping[str, torch.Size], model: torch.nn.Module, tensor_parallel: int
) -> None:
    def describe(shape: torch.Size, trained: bool) -> str:
        return f"{list(shape)} {'trained' if trained else 'frozen'}"

    buffers = {name for name, _ in model.named_buffers()}
    there = {n: describe(info.shape, n in trained) for n, info in source.tensors.items() if n not in buffers}
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
        raise UserError(f"{source.path}: holds the weights of another network ({'; '.join(wrong[:3])}{more})")


@torch.no_grad()
def _load_untrained(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy frozen parameters and buffers."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, value in tensors.items():
        target = parameters[name] if name in parameters else buffers[name]
        # Under stage 3 parameters are sharded; all ranks receive rank 0's copy.
        with deepspeed.zero.GatheredParameters([target], modifier_rank=0, enabled=hasattr(target, "ds_id")):
            if not hasattr(target, "ds_id") or dist.get_rank() == 0:
                target.copy_(value)
