"""Writers of the output formats; the readers are in training/checkpoint/formats/."""

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from latte_flow.model.tensor_split import take_part
from latte_flow.training.checkpoint.formats import safetensors_files, torch_files
from latte_flow.training.checkpoint.formats.source import MODEL, WeightSource
from latte_flow.training.checkpoint.formats.torch_dcp import COMMON_FILE, MEGATRON_CONFIG, MEGATRON_FILE, quiet_dcp
from latte_flow.training.checkpoint.formats.torch_files import ITERATION_FILE, RANK_FILE
from latte_flow.training.checkpoint.formats.universal import (
    CAT_DIM,
    MODEL_FILE,
    MODULE,
    OPTIMIZER_FILE,
    PARAM,
    STEP_KEY,
    WEIGHT_KEY,
    ZERO_FOLDER,
)


def write_safetensors(
    folder: Path, source: WeightSource, *, max_shard_size: str | None, metadata: Mapping[str, str]
) -> None:
    """Write model.safetensors, or shards with model.safetensors.index.json. Only one shard at a time is in memory.

    Args:
        folder: output folder.
        source: the weights.
        max_shard_size: such as ``5GB``; None writes a single file.
        metadata: written to every file.

    Raises:
        ValueError: when max_shard_size is not a valid size.
    """
    metadata, infos = {"format": "pt", **metadata}, source.tensors
    if max_shard_size is None:
        save_file(
            {name: source.read(name).contiguous() for name in infos},
            folder / safetensors_files.WEIGHTS_FILE,
            metadata=metadata,
        )
        return
    try:
        split = split_state_dict_into_shards_factory(
            dict(infos),
            get_storage_size=lambda info: info.num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ValueError(f"max_shard_size: {error}; accepted: such as 5GB or 200MB") from error
    for file, names in split.filename_to_tensors.items():
        save_file({name: source.read(name).contiguous() for name in names}, folder / file, metadata=metadata)
    index = {
        "metadata": {"total_size": sum(info.num_bytes for info in infos.values())},
        "weight_map": split.tensor_to_filename,
    }
    if not split.is_sharded:  # one shard is enough; the index is still written, because it was requested
        index["weight_map"] = dict.fromkeys(infos, safetensors_files.WEIGHTS_FILE)
    (folder / safetensors_files.INDEX_FILE).write_text(json.dumps(index, indent=2))


def write_torch_file(folder: Path, source: WeightSource) -> None:
    """Write the weights as a single pytorch_model.bin, which transformers loads."""
    torch.save({name: source.read(name) for name in source.tensors}, folder / torch_files.WEIGHTS_FILE)


class _Writer(dcp.FileSystemWriter):
    """Writes no storage_meta: it holds the folder that is written to, and nobody needs it."""

    def storage_meta(self) -> None:
        return None


def write_dcp(folder: Path, source: WeightSource) -> None:
    """Write the weights as a single-rank DCP checkpoint, under their own names."""
    state = {name: source.read(name) for name in source.tensors}
    with quiet_dcp():
        try:
            dcp.save(state, storage_writer=_Writer(folder), no_dist=True)
        except dcp.api.CheckpointException as error:  # wraps the error and its traceback, per rank
            raise next(iter(error.failures.values()))[0] from None


def write_megatron_dist(folder: Path, source: WeightSource) -> None:
    """Write the weights in megatron.core.dist_checkpointing's torch_dist format; Megatron's own writer needs CUDA."""
    write_dcp(folder, source)
    torch.save({"iteration": source.step or 0}, folder / COMMON_FILE)
    (folder / MEGATRON_FILE).write_text(json.dumps(MEGATRON_CONFIG))


def write_megatron_ranks(folder: Path, source: WeightSource, *, tensor_parallel: int) -> None:
    """Write each tensor-parallel rank's part in Megatron's checkpoint layout.

    Raises:
        ValueError: when the number of ranks does not divide a tensor that must be split.
    """
    for rank in range(tensor_parallel):  # rereading costs less than holding the whole model in memory
        state = {key: take_part(key, source.read(key), rank, tensor_parallel).clone() for key in source.tensors}
        write_megatron_rank(folder, state, rank, tensor_parallel, source.step)


def write_megatron_rank(
    folder: Path, state: Mapping[str, Tensor | None], rank: int, tensor_parallel: int, step: int | None
) -> None:
    """Write one rank's state dict where Megatron looks for it; without a step it is written as a release."""
    content = {
        "checkpoint_version": 3.0,
        "iteration": step or 0,
        "tensor_model_parallel_size": tensor_parallel,
        "model": dict(state),
    }
    name = "release" if step is None else f"iter_{step:07d}"
    file = folder / name / f"mp_rank_{rank:02d}" / RANK_FILE
    file.parent.mkdir(parents=True)
    torch.save(content, file)
    (folder / ITERATION_FILE).write_text("release" if step is None else str(step))


def write_universal(folder: Path, source: WeightSource) -> None:
    """Write a universal checkpoint, with the optimizer state if the source has it, otherwise with the weights only.

    Args:
        folder: output folder.
        source: the weights; with a training state, all its kinds are written.
    """
    state, infos = source.training_state, source.tensors
    # Without a training state, trained parameters are unknown: float32 weights may initialise a run, others are kept as they are.
    trained = dict(state.shapes) if state else {n: i.shape for n, i in infos.items() if i.dtype == torch.float32}
    (folder / ZERO_FOLDER).mkdir()
    states = _without_local_paths(state.model_states) if state else _empty_model_states(source.step)
    precision = torch.bfloat16 if (states.get("ds_config") or {}).get("bf16", {}).get("enabled") is True else None
    module = {}
    for name in infos:
        if name not in trained:
            module[name] = source.read(name)
            continue
        target = folder / ZERO_FOLDER / name
        target.mkdir(parents=True)
        keys = {WEIGHT_KEY: MODEL if state else None} | {key: key for key in (state.state_keys if state else ())}
        for key, which in keys.items():
            tensor = source.read(name, which).float()
            if key == WEIGHT_KEY:
                module[name] = tensor.to(precision or tensor.dtype)
            torch.save({PARAM: tensor, CAT_DIM: 0}, target / f"{key}.pt")
        if state:
            torch.save(torch.tensor(float(state.updates)), target / f"{STEP_KEY}.pt")
    if state:
        settings = {key: value for key, value in _without_local_paths(state.optimizer).items() if key != "state"}
        counter = {
            "state": {0: {STEP_KEY: torch.tensor(float(state.updates))}},
            "param_groups": settings["param_groups"],
        }
        torch.save(settings | {"optimizer_state_dict": counter}, folder / ZERO_FOLDER / OPTIMIZER_FILE)
    states |= {
        MODULE: module,
        "param_shapes": [{name: torch.Size(shape) for name, shape in trained.items()}],
        "dp_world_size": 1,
        "mp_world_size": 1,
    }
    torch.save(states, folder / MODEL_FILE)


def _empty_model_states(step: int | None) -> dict:
    return {
        "buffer_names": [],
        "optimizer": None,
        "lr_scheduler": None,
        "shared_params": {},
        "frozen_param_shapes": {},
        "global_steps": step or 0,
        "global_samples": 0,
        "skipped_steps": 0,
        "ds_version": version("deepspeed"),
    }


def _without_local_paths(value: Any) -> Any:
    """Return a training state whose absolute paths (of DeepSpeed's configuration) are reduced to their last part."""
    if isinstance(value, Mapping):
        return {key: _without_local_paths(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_local_paths(item) for item in value)
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
