"""Describe a checkpoint without converting it."""

from pathlib import Path

import torch

from latte_flow.training.checkpoint.formats.source import EMA, MODEL
from latte_flow.training.checkpoint.opening import open_checkpoint


def inspect(path: str, *, tag: str | None = None, model_folder: str | None = None, tensors: bool = False) -> dict:
    """Return a description of a checkpoint: format, step, world size, kinds of weights, parameters, types, sizes.

    Args:
        path: a checkpoint of any format.
        tag: checkpoint folder of a training output_dir or a DeepSpeed folder; None for the newest.
        model_folder: folder with config.json, if not beside the weights.
        tensors: whether to list every tensor's type and shape too.
    """
    opened = open_checkpoint(Path(path), tag=tag, model_folder=model_folder and Path(model_folder), contents=False)
    source = opened.source
    infos = source.tensors
    dtypes: dict[str, int] = {}
    for info in infos.values():
        dtypes[_name(info.dtype)] = dtypes.get(_name(info.dtype), 0) + info.shape.numel()
    summary = {
        "path": str(source.path),
        "format": source.format,
        "step": source.step,
        "world_size": source.world_size,
        "weights": [kind for kind in source.kinds if kind in (MODEL, EMA)],
        "optimizer_state": list(source.training_state.state_keys) if source.training_state else [],
        "parameters": sum(info.shape.numel() for info in infos.values()),
        "parameters_by_dtype": dtypes,
        "bytes": sum(info.num_bytes for info in infos.values()),
        "num_tensors": len(infos),
        "model_folder": None if opened.components is None else str(opened.components),
    }
    if tensors:
        summary["tensors"] = {name: f"{_name(i.dtype)} {list(i.shape)}" for name, i in sorted(infos.items())}
    return summary


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
