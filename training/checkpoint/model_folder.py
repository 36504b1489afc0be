"""The model folder of a run and of a converted checkpoint: everything of a pipeline except the network's weights.

    config.json      the network's configuration
    pipeline.json    prompt template, class names, codec, and the location of the VLM
    tokenizer/       the VLM's tokenizer and image processor
    vlm/             the VLM, if it has no path of its own (the tiny VLM)

In a training output_dir it is ``model/``, without weights. A converted checkpoint also holds the weights, in any format of
training/checkpoint/formats. A pipeline saved for inference only is a diffusers folder instead (model/pipeline.py).
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Required

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import TypedDict  # pydantic needs it below Python 3.12

from latte_flow.model.backbone import load_image_processor, load_tokenizer, load_vlm
from latte_flow.model.codecs import LatentCodec, codec_checkpoint, load_codec
from latte_flow.model.configuration import LatteFlowConfig, load_network_config
from latte_flow.model.files import read_json, reading
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.pipeline import LatteFlowPipeline
from latte_flow.model.settings import STRICT, PromptSettings, locate_saved, read_settings
from latte_flow.training.checkpoint.formats.matching import load_weights, match_weights
from latte_flow.training.checkpoint.formats.source import WeightSource
from latte_flow.training.errors import naming

PIPELINE_FILE = "pipeline.json"
VLM_FOLDER = "vlm"
TOKENIZER_FOLDER = "tokenizer"
Size = Annotated[int, Field(gt=0, le=2**16)]


class CodecSettings(TypedDict, total=False):
    """Arguments of model.codecs.load_codec."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    kind: Required[str]
    path: str | None
    preset: str | None
    scaling_factor: Annotated[float, Field(gt=0)] | None
    patch: Size
    image_channels: Size


@dataclass(config=STRICT, kw_only=True)
class PipelineConfig(PromptSettings):
    """What a pipeline needs in addition to the networks' configurations; the content of pipeline.json.

    Attributes:
        resolution: R, side of the images in pixels.
        image_channels: c.
        codec: arguments of model.codecs.load_codec; a relative path starts at the model folder if its first part is ``..``.
    """

    resolution: Size
    image_channels: Size
    codec: CodecSettings

    @classmethod
    def load(cls, folder: Path) -> "PipelineConfig":
        """Read a model folder's pipeline.json.

        Raises:
            FileNotFoundError: when it does not exist.
            ValueError: when its content is invalid; the message names the field and what is accepted.
        """
        file = folder / PIPELINE_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found; accepted: a model folder")
        return read_json(file, partial(read_settings, cls))

    def load_frozen_vlm(self, folder: Path, dtype: torch.dtype | None, path: str | None = None):
        """Load the frozen VLM that a Couple model was trained with.

        Args:
            folder: the model folder.
            dtype: dtype of the weights; None keeps the stored one.
            path: its folder or hub id, instead of the one in these settings.

        Raises:
            UserError: when it is missing or is a different VLM.
        """
        with naming("vlm."):
            if path is None:
                path = locate_saved(self.vlm_path, folder, "vlm_path") if self.vlm_path else str(folder / VLM_FOLDER)
            vlm, _ = load_vlm(path, dtype, folder / TOKENIZER_FOLDER, expected_fingerprint=self.vlm_fingerprint)
        return vlm

    def load_codec(self, folder: Path, dtype: torch.dtype, path: str | None = None) -> LatentCodec:
        """Load the codec.

        Args:
            folder: the model folder.
            dtype: dtype of the weights.
            path: the autoencoder's folder or hub id, instead of the one in these settings.

        Raises:
            UserError: when it is missing or of another kind.
        """
        with naming("codec."):
            settings: dict[str, Any] = dict(self.codec)
            if path is not None:
                settings["path"] = path
            elif (own := codec_checkpoint(**settings)) is not None:
                settings["path"] = locate_saved(str(own), folder, "codec_path")
            return load_codec(**settings, dtype=dtype)


def save_components(
    folder: Path, network: LatteFlowConfig, config: PipelineConfig, *, tokenizer, image_processor, vlm
) -> None:
    """Write a model folder; existing files are overwritten.

    Args:
        folder: folder to write to.
        network: the network's configuration.
        config: the pipeline's configuration. pipeline.json is written last: without it the folder is incomplete.
        tokenizer: the VLM's tokenizer.
        image_processor: the VLM's image processor, or None.
        vlm: the frozen VLM; written only if it has no path of its own and is not part of the network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    if image_processor is not None:
        image_processor.save_pretrained(folder / TOKENIZER_FOLDER)
    if config.vlm_path is None and network.variant == "couple":
        vlm.save_pretrained(folder / VLM_FOLDER)
    (folder / PIPELINE_FILE).write_text(json.dumps(dataclasses.asdict(config), indent=1))


def build_pipeline(
    folder: Path,
    weights: Mapping[str, Tensor] | WeightSource,
    kind: str | None,
    dtype: torch.dtype,
    *,
    vlm_path: str | None = None,
    codec_path: str | None = None,
) -> LatteFlowPipeline:
    """Build the pipeline of a model folder, in eval mode.

    Args:
        folder: the model folder.
        weights: the network's state dict, or a source to read it from.
        kind: ``model`` or ``ema`` for a source that holds both; None for its default: the averaged weights, if it has them.
        dtype: dtype of all networks.
        vlm_path: folder or hub id of a Couple model's VLM, instead of that in pipeline.json.
        codec_path: folder or hub id of the autoencoder, instead of that in pipeline.json.

    Raises:
        FileNotFoundError: when the folder is not a model folder.
        ValueError: when the weights do not fit the network, or the VLM is not the one it was trained with.
    """
    config = PipelineConfig.load(folder)
    if not (folder / TOKENIZER_FOLDER).is_dir():  # transformers would look for it on the hub
        raise ValueError(f"{folder / TOKENIZER_FOLDER} not found; accepted: a model folder")
    network = load_network_config(folder)
    with (
        reading(folder / "config.json"),
        torch.device("meta"),
    ):  # weights of other shapes are refused before they take memory
        match_weights(LatteFlowModel(network), weights.tensors if isinstance(weights, WeightSource) else weights)
    model = LatteFlowModel(network)
    load_weights(model, weights, weights.default_kind if kind is None and isinstance(weights, WeightSource) else kind)
    codec = config.load_codec(folder, dtype, codec_path)
    return LatteFlowPipeline(
        model=model.to(dtype).eval(),  # type: ignore[arg-type]  # transformers' wrapper hides torch's signature
        tokenizer=load_tokenizer(folder / TOKENIZER_FOLDER),
        codec=codec,
        vlm=config.load_frozen_vlm(folder, dtype, vlm_path) if model.config.variant == "couple" else None,
        image_processor=load_image_processor(folder / TOKENIZER_FOLDER),
        prompt_template=config.prompt_template,
        null_prompt=config.null_prompt,
        max_prompt_tokens=config.max_prompt_tokens,
        class_names=config.class_names,
        vlm_path=vlm_path or config.vlm_path,
        vlm_fingerprint=config.vlm_fingerprint,
    )
