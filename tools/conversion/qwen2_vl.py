"""The understanding path as a stock Qwen2-VL folder: transformers loads it with no code of ours."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from model.configuration import LatteFlowConfig
from model.pipeline import PIPELINE_FILE, TOKENIZER_FOLDER, VLM_FOLDER
from model.vlm import checkpoint_folder, fingerprint, load_vlm
from model.weights.matching import load_weights
from model.weights.source import WeightSource

PREFIX = "vlm."
"""Of the VLM's weights in a Blend model."""


def write_qwen2_vl(
    folder: Path,
    source: WeightSource,
    config: LatteFlowConfig,
    components: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> None:
    """Write the VLM that answers questions: for Blend the trained one, for Couple the frozen one.

    Args:
        folder: to write to.
        source: the model's weights, under its own names.
        config: of the model.
        components: the model folder, with the tokenizer, the image processor, and a Couple model's VLM or its path.
        dtype: of the weights written; None keeps what there is: a Blend's trained type, a Couple's VLM's own.
        max_shard_size: such as ``5GB``.

    Raises:
        ValueError: when the VLM of a Couple model is not there, or is another one than it was trained with.
    """
    if not (components / TOKENIZER_FOLDER).is_dir():
        raise ValueError(f"{components / TOKENIZER_FOLDER} not found; a Qwen2-VL folder needs the tokenizer")
    if config.variant == "blend":
        weights = {name.removeprefix(PREFIX): source.read(name) for name in source.tensors if name.startswith(PREFIX)}
        vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        if dtype is None:
            dtype = max((t.dtype for t in weights.values()), key=lambda d: d.itemsize)
        load_weights(vlm.to(dtype), weights)
    else:
        settings = json.loads((components / PIPELINE_FILE).read_text(encoding="utf-8"))
        path = settings["vlm_path"] or components / VLM_FOLDER
        vlm, _ = load_vlm(path, dtype=dtype, tokenizer_path=components / TOKENIZER_FOLDER)
        expected = settings["vlm_fingerprint"]
        if expected and fingerprint(checkpoint_folder(path)) != expected:
            raise ValueError(f"vlm_path: {path} is not the VLM that this model was trained with (fingerprint differs)")
    vlm.save_pretrained(folder, max_shard_size=max_shard_size)
    shutil.copytree(components / TOKENIZER_FOLDER, folder, dirs_exist_ok=True)
