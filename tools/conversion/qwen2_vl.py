"""The understanding path as a stock Qwen2-VL folder, which transformers loads without our code."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from latte_flow.model.backbone import load_vlm
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.training.checkpoint.formats.matching import load_weights
from latte_flow.training.checkpoint.formats.source import TensorInfo, WeightSource
from latte_flow.training.checkpoint.model_folder import TOKENIZER_FOLDER, PipelineConfig

PREFIX = "vlm."
"""Prefix of the VLM's weights in a Blend model."""


def write_qwen2_vl(
    folder: Path,
    source: WeightSource,
    config: LatteFlowConfig,
    components: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> None:
    """Write the VLM of ``load_understanding_path`` with its tokenizer and image processor.

    Args:
        folder: output folder.
        source, config, components, dtype: see ``load_understanding_path``.
        max_shard_size: such as ``5GB``.
    """
    vlm = load_understanding_path(source, config, components, dtype)
    vlm.save_pretrained(folder, max_shard_size=max_shard_size)
    shutil.copytree(components / TOKENIZER_FOLDER, folder, dirs_exist_ok=True)


def load_understanding_path(
    source: WeightSource, config: LatteFlowConfig, components: Path, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Return the VLM that answers questions: the trained one of Blend, the frozen one of Couple.

    Args:
        source: the model's weights, under its own names.
        config: of the model.
        components: the model folder, with the tokenizer, the image processor, and a Couple model's VLM or its path.
        dtype: type of the weights; None keeps that of Blend's trained weights or of Couple's VLM.

    Raises:
        ValueError: when the tokenizer or a Couple model's VLM is missing, or the VLM is not the one it was trained with.
    """
    if not (components / TOKENIZER_FOLDER).is_dir():
        raise ValueError(f"{components / TOKENIZER_FOLDER} not found; the understanding path needs the tokenizer")
    if config.variant != "blend":
        return PipelineConfig.load(components).load_frozen_vlm(components, dtype)
    part = _VlmPart(source)
    if dtype is None:
        dtype = max((info.dtype for info in part.tensors.values()), key=lambda d: d.itemsize)
    vlm = AutoModelForImageTextToText.from_config(config.vlm_config, dtype=dtype)
    load_weights(vlm, part)
    return vlm


def compare_qwen2_vl(
    folder: Path, source: WeightSource, config: LatteFlowConfig, components: Path
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, tensor in the folder, expected tensor) for every VLM weight that ``write_qwen2_vl`` wrote."""
    written, _ = load_vlm(folder)
    own = written.state_dict(keep_vars=True)
    if config.variant == "blend":
        part = _VlmPart(source)
        names, read = list(part.tensors), part.read
    else:
        frozen = PipelineConfig.load(components).load_frozen_vlm(components, None).state_dict(keep_vars=True)
        names, read = list(frozen), frozen.__getitem__
    for name in names:
        # The folder has a single type; frozen weights of a Blend model may have had a smaller one.
        yield name, own[name].detach(), read(name).detach().to(written.dtype)


class _VlmPart(WeightSource):
    """The VLM's weights in a Blend model, under the VLM's own names."""

    format = "vlm"

    def __init__(self, source: WeightSource):
        self.path, self.kinds, self._source = source.path, source.kinds, source
        self._tensors = {
            name.removeprefix(PREFIX): info for name, info in source.tensors.items() if name.startswith(PREFIX)
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def _read(self, name: str, kind: str) -> Tensor:
        return self._source.read(PREFIX + name, kind)
