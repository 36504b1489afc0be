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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from latte_flow.model.backbone import load_image_processor, load_tokenizer, load_vlm
from latte_flow.model.codecs import load_codec
from latte_flow.model.configuration import LatteFlowConfig, load_network_config
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.pipeline import LatteFlowPipeline
from latte_flow.training.checkpoint.formats.matching import load_weights
from latte_flow.training.checkpoint.formats.source import WeightSource
from latte_flow.training.errors import naming

PIPELINE_FILE = "pipeline.json"
VLM_FOLDER = "vlm"
TOKENIZER_FOLDER = "tokenizer"


@dataclass
class PipelineConfig:
    """What a pipeline needs in addition to the networks' configurations; the content of pipeline.json.

    Attributes:
        resolution: R, side of the images in pixels.
        image_channels: c.
        prompt_template: the user message; {} stands for the class name or the caption.
        null_prompt: the user message of the null condition.
        max_prompt_tokens: longer user messages are truncated at the end; None disables truncation.
        class_names: names of the classes, or None for free prompts.
        codec: arguments of model.codecs.load_codec.
        vlm_path: folder or hub id of the VLM; None if it is in the model folder.
        vlm_fingerprint: fingerprint of the VLM's files, None without a path; see model.backbone.fingerprint.
    """

    resolution: int
    image_channels: int
    prompt_template: str
    null_prompt: str
    max_prompt_tokens: int | None = None
    class_names: list[str] | None = None
    codec: dict = field(default_factory=dict)
    vlm_path: str | None = None
    vlm_fingerprint: str | None = None

    @classmethod
    def load(cls, folder: Path) -> "PipelineConfig":
        """Read a model folder's pipeline.json.

        Raises:
            FileNotFoundError: when it does not exist.
            ValueError: when its content is invalid.
        """
        file = folder / PIPELINE_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found; accepted: a model folder")
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file}: damaged ({error})") from error

    def load_frozen_vlm(self, folder: Path, dtype: torch.dtype | None):
        """Load the frozen VLM that a Couple model was trained with.

        Args:
            folder: the model folder.
            dtype: dtype of the weights; None keeps the stored one.

        Raises:
            UserError: when it is missing or is a different VLM.
        """
        path = self.vlm_path or folder / VLM_FOLDER
        with naming("vlm"):
            vlm, _ = load_vlm(path, dtype, folder / TOKENIZER_FOLDER, expected_fingerprint=self.vlm_fingerprint)
        return vlm


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
    folder: Path, weights: Mapping[str, Tensor] | WeightSource, kind: str | None, dtype: torch.dtype
) -> LatteFlowPipeline:
    """Build the pipeline of a model folder, in eval mode.

    Args:
        folder: the model folder.
        weights: the network's state dict, or a source to read it from.
        kind: ``model`` or ``ema`` for a source that holds both; None for its default: the averaged weights, if it has them.
        dtype: dtype of all networks.

    Raises:
        FileNotFoundError: when the folder is not a model folder.
        ValueError: when the weights do not fit the network, or the VLM is not the one it was trained with.
    """
    config = PipelineConfig.load(folder)
    if not (folder / TOKENIZER_FOLDER).is_dir():  # transformers would look for it on the hub
        raise ValueError(f"{folder / TOKENIZER_FOLDER} not found; accepted: a model folder")
    model = LatteFlowModel(load_network_config(folder))
    load_weights(model, weights, weights.default_kind if kind is None and isinstance(weights, WeightSource) else kind)
    with naming("codec"):
        codec = load_codec(**config.codec, dtype=dtype)
    return LatteFlowPipeline(
        model=model.to(dtype).eval(),  # type: ignore[arg-type]  # transformers' wrapper hides torch's signature
        tokenizer=load_tokenizer(folder / TOKENIZER_FOLDER),
        codec=codec,
        vlm=config.load_frozen_vlm(folder, dtype) if model.config.variant == "couple" else None,
        image_processor=load_image_processor(folder / TOKENIZER_FOLDER),
        prompt_template=config.prompt_template,
        null_prompt=config.null_prompt,
        max_prompt_tokens=config.max_prompt_tokens,
        class_names=config.class_names,
        vlm_path=config.vlm_path,
        vlm_fingerprint=config.vlm_fingerprint,
    )
