"""The weights of a trained checkpoint, for the tools: found, verified, read, and put into a pipeline."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from latte_flow.model.pipeline import PIPELINE_FILE, LatteFlowPipeline
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.formats.source import EXPORT_FILE
from latte_flow.training.checkpoint.formats.zero_shards import ZeroShards
from latte_flow.training.checkpoint.io import safe_unpickling
from latte_flow.training.checkpoint.manifest import MODEL_FOLDER, check_files, named_checkpoints
from latte_flow.training.errors import UserError
from latte_flow.training.optimizer import EMA_KEY

logger = logging.getLogger(__name__)

WEIGHTS = ("ema", "model")


def find_checkpoint(path: Path, *, contents: bool = True) -> Path:
    """Return the checkpoint folder that a path means: a step's folder, or the newest valid one of an output_dir.

    Args:
        path: the folder.
        contents: whether the files are read to see if they are whole, or only their sizes are looked at.

    Raises:
        UserError: when there is none.
    """
    candidates = named_checkpoints(path)
    for candidate in reversed(candidates):
        damage = "; ".join(f"{name} {what}" for name, what in check_files(candidate, contents=contents))
        if not damage:
            return candidate
        if candidates == [path]:
            raise UserError(f"{path}: damaged: {damage}")
        logger.warning("%s skipped: %s", candidate, damage)
    raise UserError(f"{path}: holds no valid checkpoint; accepted: a training output_dir, or one step's folder of it")


def load_pipeline(
    path: Path, *, weights: str = "ema", dtype: torch.dtype = torch.float32, verified: bool = False
) -> LatteFlowPipeline:
    """Load what a CHECKPOINT argument names: a training output_dir, one step's folder of it, or an exported model folder.

    Args:
        path: the folder.
        weights: ``ema`` or ``model``, for training checkpoints and universal ones; other exported folders hold one kind.
        dtype: the type of the networks.
        verified: that ``find_checkpoint`` has just returned the path: its files are not read once more to see if they are whole.

    Raises:
        UserError: when the folder is none of these, or is damaged.
    """
    try:
        if (path / PIPELINE_FILE).is_file():
            source = open_weights(path)
            kind = weights if weights in source.kinds else None
            return LatteFlowPipeline.from_pretrained(path, weights=source, kind=kind, dtype=dtype)
        if (path / EXPORT_FILE).is_file():
            raise UserError(f"{path}: holds weights, and no {PIPELINE_FILE}, which a pipeline needs")
        checkpoint = path if verified else find_checkpoint(path)
        components = checkpoint.parent.parent / MODEL_FOLDER
        return LatteFlowPipeline.from_pretrained(components, weights=read_weights(checkpoint, weights), dtype=dtype)
    except (FileNotFoundError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def read_weights(path: Path, which: str) -> dict[str, Tensor]:
    """Read the float32 weights of a checkpoint from its ZeRO shards, on the CPU.

    Args:
        path: a checkpoint's folder.
        which: ``ema``, the averaged weights, or ``model``, the trained ones.

    Returns:
        Parameter and buffer name -> tensor, as LatteFlowModel.state_dict.

    Raises:
        UserError: when ``which`` is unknown or the checkpoint has no such weights.
    """
    if which not in WEIGHTS:
        raise UserError(f"weights: {which!r} is unknown; accepted values: {', '.join(WEIGHTS)}")
    with safe_unpickling(path):
        shards = ZeroShards(path)
        if which == "model":
            return shards.read_all()
        if EMA_KEY not in shards.state_keys:
            raise UserError(f"{path}: holds no averaged weights; accepted: --weights model")
        return shards.read_all(EMA_KEY)
