"""The weights of a trained checkpoint, for the tools: found, verified, read, and put into a pipeline."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.latte_flow import LatteFlowModel
from model.pipeline import PIPELINE_FILE, LatteFlowPipeline
from model.weights.matching import MatchedSource, load_weights
from model.weights.recognise import open_weights
from model.weights.source import WeightSource
from training.checkpoint_io import safe_unpickling
from training.checkpoint_manifest import MANIFEST, STEP_FOLDER, check_files, list_checkpoints, step_name
from training.config import TrainingConfig
from training.ema import EMA_KEY
from training.errors import UserError
from training.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    MODEL_FOLDER,
    RESUME_AUTO,
    RESUME_NEVER,
    named_checkpoints,
)
from training.zero_shards import ZeroShards
from training.zero_source import SHARDS, ZeroSource

OLD_LATEST = "latest"
"""DeepSpeed's file that names the newest tag, for folders that were not written by this framework."""

logger = logging.getLogger(__name__)

WEIGHTS = ("ema", "model")


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that a path means: a step's folder, or the newest valid one of an output_dir.

    Raises:
        UserError: when there is none.
    """
    candidates = named_checkpoints(path)
    for candidate in reversed(candidates):
        damage = "; ".join(f"{name} {what}" for name, what in check_files(candidate))
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
        weights: ``ema`` or ``model``, for training checkpoints; an exported folder holds one kind.
        dtype: the type of the networks.
        verified: that ``find_checkpoint`` has just returned the path: its files are not read once more to see if they are whole.

    Raises:
        UserError: when the folder is none of these, or is damaged.
    """
    try:
        if (path / PIPELINE_FILE).is_file():
            return LatteFlowPipeline.from_pretrained(path, dtype=dtype)
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


@dataclass(frozen=True)
class OpenedCheckpoint:
    """Weights of any format, and where what belongs to them lies.

    Attributes:
        source: the weights.
        components: the model folder with config.json and, mostly, pipeline.json and the tokenizer; None where there is none.
        config_file: the training configuration, where there is one.
    """

    source: WeightSource
    components: Path | None
    config_file: Path | None


def open_checkpoint(path: Path, *, step: int | None = None, model_folder: Path | None = None) -> OpenedCheckpoint:
    """Open what a path holds, whichever format it has.

    Args:
        path: a training output_dir, one step's folder of it, a folder of DeepSpeed, or anything that ``open_weights`` takes.
        step: of a training output_dir, another one than the newest.
        model_folder: where config.json is, when not beside the weights.

    Raises:
        UserError: when it is damaged or of no known format, or ``model_folder`` holds no config.json.
    """
    try:
        if (path / CHECKPOINTS_FOLDER).is_dir() or STEP_FOLDER.fullmatch(path.name) or (path / MANIFEST).is_file():
            if step is not None:
                path = path / CHECKPOINTS_FOLDER / step_name(step)
                if not path.is_dir():
                    raise UserError(f"step: {path} not found; accepted: a step that was saved")
            checkpoint = find_checkpoint(path)
            run = checkpoint.resolve().parent.parent
            source: WeightSource = ZeroSource(checkpoint)
            candidates, config_file = [run / MODEL_FOLDER], run / CONFIG_FILE
        else:
            if step is not None:
                raise UserError(f"step: {path} is no training output_dir; accepted: one with {CHECKPOINTS_FOLDER}/")
            folder = path if path.is_dir() else path.parent
            source = ZeroSource(deepspeed) if (deepspeed := _deepspeed_folder(path)) else open_weights(path)
            above = [folder.parent, folder.parent.parent]
            candidates = [folder, folder / MODEL_FOLDER, *above, *(parent / MODEL_FOLDER for parent in above)]
            config_file = folder / CONFIG_FILE
        if model_folder is not None:
            candidates = [model_folder]
        components = next((c for c in candidates if (c / "config.json").is_file()), None)
        if components is None and model_folder is not None:
            raise UserError(f"model_folder: {model_folder} has no config.json; accepted: an output_dir's model/")
    except (ValueError, OSError) as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    return OpenedCheckpoint(source, components, config_file if config_file.is_file() else None)


def find_initial_weights(config: TrainingConfig) -> OpenedCheckpoint | None:
    """Return the weights that ``init_from`` names; None without it, and for a run that has checkpoints of its own.

    Raises:
        UserError: when it holds none that can be read, or ``resume`` names another start.
    """
    if config.init_from is None or list_checkpoints(Path(config.output_dir) / CHECKPOINTS_FOLDER):
        return None
    if config.resume not in (RESUME_AUTO, RESUME_NEVER):
        raise UserError(f"init_from, resume: got {config.init_from} and {config.resume}; accepted: one of them")
    try:
        opened = open_checkpoint(Path(config.init_from))
    except UserError as error:
        raise UserError(f"init_from: {error}") from error
    if opened.components is None or not (opened.components / PIPELINE_FILE).is_file():
        raise UserError(
            f"init_from: {config.init_from} has no {PIPELINE_FILE} beside it; accepted: a checkpoint, or a folder of "
            "tools/convert_checkpoint.py"
        )
    return opened


def load_initial_weights(model: LatteFlowModel, opened: OpenedCheckpoint) -> str:
    """Load weights into a new model, the averaged ones where there are some; return what was loaded, for people.

    Raises:
        UserError: when they are not of this network.
    """
    source = opened.source
    try:
        matched = MatchedSource(source, model, source.default_kind)
        load_weights(model, {name: matched.read(name) for name in matched.tensors})
    except ValueError as error:
        raise UserError(f"init_from: {source.path}: {error}") from error
    step = "" if source.step is None else f" of step {source.step}"
    return f"initial weights from {source.path} ({source.format}, {source.default_kind}{step})"


def _deepspeed_folder(path: Path) -> Path | None:
    """Return the folder of shards that a path of DeepSpeed's means; None when it is none of its."""
    if not path.is_dir():
        return None
    if any(path.glob(SHARDS)):
        return path
    latest = path / OLD_LATEST
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if tag and Path(tag).name == tag and any((path / tag).glob(SHARDS)):
            return path / tag
        raise UserError(f"{latest}: names {tag!r}, and there are no shards of DeepSpeed's in such a folder")
    return None
