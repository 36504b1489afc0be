"""A checkpoint of any format, and where what belongs to it lies: its network's configuration, tokenizer, and the run's fields."""

from dataclasses import dataclass
from pathlib import Path

from latte_flow.training.checkpoint.formats.recognise import open_weights
from latte_flow.training.checkpoint.formats.source import EXPORT_FILE, WeightSource, read_export_record
from latte_flow.training.checkpoint.formats.zero_source import SHARDS, ZeroSource
from latte_flow.training.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    LATEST,
    MANIFEST,
    MODEL_FOLDER,
    STEP_FOLDER,
    check_files,
)
from latte_flow.training.checkpoint.trained_weights import find_checkpoint
from latte_flow.training.configs.saved import CONFIG_FILE
from latte_flow.training.errors import UserError


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


def open_checkpoint(
    path: Path, *, tag: str | None = None, model_folder: Path | None = None, contents: bool = True
) -> OpenedCheckpoint:
    """Open what a path holds, whichever format it has.

    Args:
        path: a training output_dir, one step's folder of it, a folder of DeepSpeed, or anything that ``open_weights`` takes.
        tag: of a training output_dir (step_0005000) or another folder of DeepSpeed's, another one than the newest.
        model_folder: where config.json is, when not beside the weights.
        contents: whether files whose SHA-256 is known, ours and exported ones, are read to see if they are whole.

    Raises:
        UserError: when it is damaged or of no known format, or ``model_folder`` holds no config.json.
    """
    try:
        if _is_of_a_run(path):
            if tag is not None:
                if not (path / CHECKPOINTS_FOLDER).is_dir():
                    raise UserError(f"tag: {path} is one step's folder already; accepted: none, or the output_dir")
                path = _tagged(path / CHECKPOINTS_FOLDER, tag)
            checkpoint = find_checkpoint(path, contents=contents)
            run = checkpoint.resolve().parent.parent
            source: WeightSource = ZeroSource(checkpoint)
            candidates, config_file = [run / MODEL_FOLDER], run / CONFIG_FILE
        else:
            path = _tagged(path, tag) if tag else path
            folder = path if path.is_dir() else path.parent
            source = ZeroSource(deepspeed) if (deepspeed := _deepspeed_folder(path)) else open_weights(path)
            if contents and (folder / EXPORT_FILE).is_file():
                for name, problem in check_files(folder, record=read_export_record):
                    raise UserError(f"{folder / name}: {problem}")
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


def _is_of_a_run(path: Path) -> bool:
    """Return whether a path is a training output_dir or one step's folder of it; one that lost its manifest is a damaged one."""
    if (path / CHECKPOINTS_FOLDER).is_dir() or (path / MANIFEST).is_file():
        return True
    return bool(STEP_FOLDER.fullmatch(path.name)) and any(path.glob(SHARDS))


def _tagged(folder: Path, tag: str) -> Path:
    """Return the folder of a tag."""
    if Path(tag).name != tag or not (folder / tag).is_dir():
        there = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        raise UserError(
            f"tag: {folder / tag} not found; accepted: {', '.join(there) or 'none, for this is no folder of tags'}"
        )
    return folder / tag


def _deepspeed_folder(path: Path) -> Path | None:
    """Return the folder of shards that a path of DeepSpeed's means; None when it is none of its."""
    if not path.is_dir():
        return None
    if any(path.glob(SHARDS)):
        return path
    latest = path / LATEST
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if tag and Path(tag).name == tag and any((path / tag).glob(SHARDS)):
            return path / tag
        raise UserError(f"{latest}: names {tag!r}, and there are no shards of DeepSpeed's in such a folder")
    return None
