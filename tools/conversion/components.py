"""The model folder of a converted checkpoint: known files alone, no links, and nothing that tells where it was made."""

import dataclasses
import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from latte_flow.model.files import copy_settings, is_own_file
from latte_flow.model.settings import portable_path
from latte_flow.training.checkpoint.model_folder import PIPELINE_FILE, TOKENIZER_FOLDER, VLM_FOLDER, PipelineConfig
from latte_flow.training.configs.saved import CONFIG_FILE, load_config, portable_config, save_config
from latte_flow.training.errors import UserError

NETWORK_FILE = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""What transformers saves of a VLM's tokenizer, its image processor and its processor."""
VLM_FILES = (
    *TOKENIZER_FILES,
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""What transformers saves of a model, and may save beside it."""


def copy_components(components: Path, config_file: Path | None, folder: Path) -> list[str]:
    """Copy config.json, pipeline.json, tokenizer/, vlm/ and config.yaml, those that are there, without absolute paths.

    Args:
        components: the model folder.
        config_file: the run's configuration; None for the model folder's, if it has one.
        folder: where to copy to.

    Returns:
        What was left out, for ``report_left_out``.

    Raises:
        ValueError: when a file is damaged, or a folder holds no known file.
    """
    copy_settings(components / NETWORK_FILE, folder / NETWORK_FILE)
    if (components / PIPELINE_FILE).is_file():
        config = PipelineConfig.load(components)
        codec = config.codec | {"path": portable_path(config.codec["path"])} if "path" in config.codec else config.codec
        config = dataclasses.replace(config, vlm_path=portable_path(config.vlm_path), codec=codec)
        (folder / PIPELINE_FILE).write_text(json.dumps(dataclasses.asdict(config), indent=1))
    left = copy_tokenizer(components, folder / TOKENIZER_FOLDER) if (components / TOKENIZER_FOLDER).is_dir() else []
    if (components / VLM_FOLDER).is_dir():
        left += _copy_files(components, VLM_FOLDER, VLM_FILES, folder / VLM_FOLDER)
    config_file = config_file or components / CONFIG_FILE
    if config_file.is_file():
        try:
            save_config(portable_config(load_config(config_file)), folder / CONFIG_FILE)
        except UserError as error:
            left.append(f"{CONFIG_FILE} ({error})")
    return left


def copy_tokenizer(components: Path, folder: Path) -> list[str]:
    """Copy a model folder's tokenizer and image processor to a folder; see ``copy_components``."""
    return _copy_files(components, TOKENIZER_FOLDER, TOKENIZER_FILES, folder)


def report_left_out(left: list[str]) -> None:
    """Print one line about the files that were not copied."""
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        print(f"not copied: {', '.join(left[:5])}{more}; copied: the regular files that transformers saves")


def _copy_files(components: Path, name: str, known: tuple[str, ...], folder: Path) -> list[str]:
    """Copy the known files of a folder that are regular files of the model folder; return the others.

    Links inside the model folder or a hub cache (a snapshot's) are copied as files.
    """
    copied, left = 0, []
    for file in sorted((components / name).rglob("*")):
        relative = file.relative_to(components / name)
        if any(fnmatchcase(str(relative), pattern) for pattern in known) and is_own_file(file, components):
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.name.endswith("config.json"):
                copy_settings(file, target)
            else:
                shutil.copyfile(file, target)
            copied += 1
        elif file.is_symlink() or not file.is_dir():
            left.append(f"{name}/{relative}")
    if not copied:
        raise ValueError(
            f"{components / name}: none of its files is copied; accepted: {', '.join(known)}, no links out of it"
        )
    return left
