"""The understanding path as a stock folder of its VLM's family, which transformers loads without our code."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from latte_flow.model.backbone import load_vlm
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.tools.conversion.components import copy_tokenizer
from latte_flow.training.checkpoint.formats.matching import check_finite, load_weights
from latte_flow.training.checkpoint.formats.source import TensorInfo, WeightSource
from latte_flow.training.checkpoint.model_folder import TOKENIZER_FOLDER, PipelineConfig
from latte_flow.training.checkpoint.opening import OpenedCheckpoint

PREFIX = "vlm."
"""Prefix of the VLM's weights in a Blend model."""


def write_understanding_path(
    folder: Path,
    source: WeightSource,
    config: LatteFlowConfig,
    opened: OpenedCheckpoint,
    *,
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> list[str]:
    """Write the VLM of ``load_understanding_path`` with its tokenizer and image processor.

    Args:
        folder: output folder.
        source, config, opened, dtype: see ``load_understanding_path``.
        max_shard_size: such as ``5GB``.

    Returns:
        The files that were not copied.
    """
    vlm = load_understanding_path(source, config, opened, dtype)
    vlm.save_pretrained(folder, max_shard_size=max_shard_size)
    return copy_tokenizer(_components(opened), folder)


def load_understanding_path(
    source: WeightSource, config: LatteFlowConfig, opened: OpenedCheckpoint, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Return the VLM that answers questions: the trained one of Blend, the frozen one of Couple.

    Args:
        source: the model's weights, under its own names.
        config: of the model.
        opened: where the model folder is, with the tokenizer, the image processor, and a Couple model's VLM or its path.
        dtype: type of the weights; None keeps that of Blend's trained weights or of Couple's VLM.

    Raises:
        ValueError: when the tokenizer or a Couple model's VLM is missing, or the VLM is not the one it was trained with.
    """
    components = _components(opened)
    if not (components / TOKENIZER_FOLDER).is_dir():
        raise ValueError(f"{components / TOKENIZER_FOLDER} not found; the understanding path needs the tokenizer")
    if config.variant != "blend":
        vlm = _frozen_vlm(opened, dtype)
        for name, tensor in vlm.state_dict().items():
            check_finite(f"{components}: vlm: {name}", tensor)
        return vlm
    part = _VlmPart(source)
    if dtype is None:
        dtype = max((info.dtype for info in part.tensors.values()), key=lambda d: d.itemsize)
    vlm = AutoModelForImageTextToText.from_config(config.vlm_config, dtype=dtype, trust_remote_code=False)
    load_weights(vlm, part)
    return vlm


def compare_understanding_path(
    folder: Path, source: WeightSource, config: LatteFlowConfig, opened: OpenedCheckpoint
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, tensor in the folder, expected tensor) for every VLM weight that ``write_understanding_path`` wrote."""
    written, _ = load_vlm(folder)
    own = written.state_dict(keep_vars=True)
    if config.variant == "blend":
        part = _VlmPart(source)
        names, read = list(part.tensors), part.read
    else:
        frozen = _frozen_vlm(opened, None).state_dict(keep_vars=True)
        names, read = list(frozen), frozen.__getitem__
    for name in names:
        # The folder has a single type; frozen weights of a Blend model may have had a smaller one.
        yield name, own[name].detach(), read(name).detach().to(written.dtype)


def _components(opened: OpenedCheckpoint) -> Path:
    assert opened.components is not None, "a conversion needs config.json"
    return opened.components


def _frozen_vlm(opened: OpenedCheckpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    components = _components(opened)
    return PipelineConfig.load(components).load_frozen_vlm(components, dtype, opened.vlm_path)


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
