"""Opens checkpoints of any format by path: the weights, their model folder and configuration, or the whole pipeline."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latte_flow.model.files import reading
from latte_flow.model.pipeline import LatteFlowPipeline
from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.formats.source import (
    EXPORT_FILE,
    WeightSource,
    check_step,
    require_export_record,
)
from latte_flow.training.checkpoint.formats.zero_shards import ZeroShards
from latte_flow.training.checkpoint.formats.zero_source import SHARDS, ZeroSource
from latte_flow.training.checkpoint.io import safe_unpickling
from latte_flow.training.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    LATEST,
    MANIFEST,
    MODEL_FOLDER,
    STEP_FOLDER,
    check_files,
    named_checkpoints,
    output_dir_of,
)
from latte_flow.training.checkpoint.model_folder import PIPELINE_FILE, build_pipeline
from latte_flow.training.configs.saved import CONFIG_FILE
from latte_flow.training.errors import UserError
from latte_flow.training.optimizer import EMA_KEY

logger = logging.getLogger(__name__)

WEIGHTS = ("ema", "model")


def find_checkpoint(path: Path, *, contents: bool = True) -> Path:
    """Return the checkpoint folder a path refers to: a step's folder, or the newest valid one of an output_dir.

    Args:
        path: the folder.
        contents: whether to verify the contents of the files, not only their sizes.

    Raises:
        UserError: when there is no valid checkpoint.
    """
    candidates = named_checkpoints(path)
    unseen = list(candidates)
    while unseen:
        candidate = unseen.pop()
        damage = "; ".join(f"{name} {what}" for name, what in check_files(candidate, contents=contents))
        if not damage:
            return candidate
        if candidates == [path]:
            raise UserError(f"{path}: damaged: {damage}")
        now = named_checkpoints(path)
        if now != candidates:  # a run in progress has saved a newer one and removed this one
            candidates, unseen = now, list(now)
        else:
            logger.warning("%s skipped: %s", candidate, damage)
    raise UserError(f"{path}: holds no valid checkpoint; accepted: a training output_dir, or one step's folder of it")


class RemovedError(UserError):
    """A checkpoint that was valid has disappeared while it was read."""


def is_pipeline(path: Path) -> bool:
    """Return whether a folder is a pipeline by itself: a saved pipeline or a converted checkpoint, not one of a run."""
    return (path / LatteFlowPipeline.config_name).is_file() or (path / PIPELINE_FILE).is_file()


def load_pipeline(
    path: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype = torch.float32,
    vlm_path: str | Path | None = None,
    codec_path: str | Path | None = None,
    verified: bool = False,
) -> LatteFlowPipeline:
    """Load the pipeline that a CHECKPOINT argument names.

    Args:
        path: a training output_dir, one step's folder of it, a folder of tools/convert_checkpoint.py in any format, or a
            pipeline written by ``LatteFlowPipeline.save_pretrained``.
        weights: ``ema`` or ``model``, for training and universal checkpoints; other folders hold only one kind.
        dtype: dtype of the networks.
        vlm_path: folder or hub id of the VLM that a Couple model was trained with, instead of the recorded one. Exports record a
            folder as one beside them, and only an id that is given is downloaded.
        codec_path: the same for the autoencoder.
        verified: the path was just returned by ``find_checkpoint``, so its files are not verified again.

    Raises:
        RemovedError: when the named or verified checkpoint was removed meanwhile.
        UserError: when the folder is none of these, or is damaged.
    """
    path = Path(path)
    given = {name: str(p) for name, p in (("vlm_path", vlm_path), ("codec_path", codec_path)) if p is not None}
    try:
        if (path / LatteFlowPipeline.config_name).is_file():
            if codec_path is not None:
                raise UserError(f"codec_path: {path} holds its codec; accepted: None")
            return LatteFlowPipeline.from_pretrained(path, dtype=dtype, **given)
        if (path / PIPELINE_FILE).is_file():
            source = open_weights(path)
            return build_pipeline(path, source, weights if weights in source.kinds else None, dtype, **given)
        if (path / EXPORT_FILE).is_file():
            raise UserError(f"{path}: holds weights but no {PIPELINE_FILE}, which a pipeline needs")
        checkpoint, state = _read_newest(path, weights, verified)
        return build_pipeline(output_dir_of(checkpoint) / MODEL_FOLDER, state, None, dtype, **given)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def _read_newest(path: Path, weights: str, verified: bool) -> tuple[Path, dict[str, Tensor]]:
    """Find and read a checkpoint; for one that a run in progress removes meanwhile, unless it was named, the newer one."""
    while True:
        checkpoint = path if verified else find_checkpoint(path)
        try:
            return checkpoint, read_weights(checkpoint, weights)
        except ValueError as error:
            if not any(check_files(checkpoint, contents=False)):
                raise
            if checkpoint == path:
                raise RemovedError(
                    f"{path}: was removed while it was read, as a run in progress does with old checkpoints; accepted: the "
                    "output_dir, whose newest checkpoint is read, or a step that checkpoint.keep_every keeps"
                ) from error


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
    with safe_unpickling(path), reading(path):
        shards = ZeroShards(path)
        if which == "model":
            return shards.read_all()
        if EMA_KEY not in shards.state_keys:
            raise UserError(f"{path}: holds no averaged weights; accepted: --weights model")
        return shards.read_all(EMA_KEY)


@dataclass(frozen=True)
class OpenedCheckpoint:
    """Weights of any format, and the location of the files that belong to them.

    Attributes:
        source: the weights.
        components: the model folder with config.json and usually pipeline.json and the tokenizer; None if there is none.
        config_file: the training configuration, if there is one.
        vlm_path: folder or hub id of a Couple model's VLM, instead of the one that the model folder names.
    """

    source: WeightSource
    components: Path | None
    config_file: Path | None
    vlm_path: str | None = None


def open_checkpoint(
    path: Path, *, tag: str | None = None, model_folder: Path | None = None, contents: bool = True
) -> OpenedCheckpoint:
    """Open a checkpoint of any format.

    Args:
        path: a training output_dir, one step's folder of it, a DeepSpeed folder, or anything that ``open_weights`` accepts.
        tag: checkpoint of a training output_dir (step_0005000) or of a DeepSpeed folder; default: the newest.
        model_folder: folder of config.json, if not next to the weights.
        contents: whether to verify files with a recorded SHA-256 (training and exported checkpoints).

    Raises:
        UserError: when it is damaged or its format is unknown, or ``model_folder`` holds no config.json.
    """
    try:
        if _is_of_a_run(path):
            if tag is not None:
                if not (path / CHECKPOINTS_FOLDER).is_dir():
                    raise UserError(f"tag: {path} is already one step's folder; accepted: none, or the output_dir")
                path = _tagged(path / CHECKPOINTS_FOLDER, tag)
            checkpoint = find_checkpoint(path, contents=contents)
            run = output_dir_of(checkpoint)
            source: WeightSource = ZeroSource(checkpoint)
            candidates, config_file = [run / MODEL_FOLDER], run / CONFIG_FILE
        else:
            path = _tagged(path, tag) if tag else path
            folder = path if path.is_dir() else path.parent
            source = ZeroSource(deepspeed) if (deepspeed := _deepspeed_folder(path)) else open_weights(path)
            if contents and (folder / EXPORT_FILE).is_file():
                for name, problem in check_files(folder, record=require_export_record):
                    raise UserError(f"{folder / name}: {problem}")
            above = [folder.parent, folder.parent.parent]
            candidates = [folder, folder / MODEL_FOLDER, *above, *(parent / MODEL_FOLDER for parent in above)]
            config_file = folder / CONFIG_FILE
        check_step(source)
        if model_folder is not None:
            candidates = [model_folder]
        components = next((c for c in candidates if (c / "config.json").is_file()), None)
        if components is None and model_folder is not None:
            raise UserError(f"model_folder: {model_folder} has no config.json; accepted: an output_dir's model/")
    except (ValueError, OSError) as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    return OpenedCheckpoint(source, components, config_file if config_file.is_file() else None)


def _is_of_a_run(path: Path) -> bool:
    """Return whether a path is a training output_dir or one step's folder of it, including one without its manifest (damaged)."""
    if (path / CHECKPOINTS_FOLDER).is_dir() or (path / MANIFEST).is_file():
        return True
    return bool(STEP_FOLDER.fullmatch(path.name)) and any(path.glob(SHARDS))


def _tagged(folder: Path, tag: str) -> Path:
    """Return the folder of a tag."""
    if Path(tag).name != tag or not (folder / tag).is_dir():
        there = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        raise UserError(
            f"tag: {folder / tag} not found; accepted: {', '.join(there) or 'none, the folder holds no tags'}"
        )
    return folder / tag


def _deepspeed_folder(path: Path) -> Path | None:
    """Return the folder of DeepSpeed shards that a path refers to, or None if it is not a DeepSpeed folder."""
    if not path.is_dir():
        return None
    if any(path.glob(SHARDS)):
        return path
    latest = path / LATEST
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if tag and Path(tag).name == tag and any((path / tag).glob(SHARDS)):
            return path / tag
        raise UserError(f"{latest}: names {tag!r}, but there are no DeepSpeed shards in such a folder")
    return None
