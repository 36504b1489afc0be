"""The components of a run: the VLM, its tokenizer, the codec, the network and its configuration.

They can also be built on the meta device from configurations alone: tensors there have shapes but no data (dry_run.py).
"""

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
)

from latte_flow.model.activation_checkpointing import checkpoint_activations
from latte_flow.model.backbone import checkpoint_folder, fingerprint, load_tokenizer, load_vlm, read_vlm_config
from latte_flow.model.codecs import LatentCodec, codec_checkpoint, load_codec
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.context import check_text
from latte_flow.model.files import loading
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.settings import read_settings
from latte_flow.model.tensor_split import check_tensor_parallel
from latte_flow.model.tiny_vlm import build_tiny_tokenizer, build_tiny_vlm, tiny_vlm_config
from latte_flow.training.checkpoint.model_folder import PIPELINE_FILE, TOKENIZER_FOLDER, VLM_FOLDER, PipelineConfig
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.images import ImageDataset
from latte_flow.training.data.latents.dataset import LatentDataset
from latte_flow.training.data.prompts import PromptTokens
from latte_flow.training.data.sources import find_source
from latte_flow.training.distributed.batch_layout import BatchLayout
from latte_flow.training.distributed.ranks import Ranks
from latte_flow.training.distributed.zero import mark_universal
from latte_flow.training.errors import UserError, naming
from latte_flow.training.initial_weights import InitialWeights

BACKBONES = Path(__file__).parent / "configs" / "backbones"
BUNDLED = {
    "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl_2b",
    "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers": "dc_ae_f32c32_in_1.0",
}
"""Hub id -> folder in ``BACKBONES`` with its config.json."""

Images = ImageDataset | LatentDataset


class Components(NamedTuple):
    """The components of a run, apart from the network's own weights. The VLM is frozen."""

    vlm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    codec: LatentCodec
    model_config: LatteFlowConfig
    pipeline_config: PipelineConfig


class MetaComponents(NamedTuple):
    """The components on the meta device, and the tokens of the prompts; None with ``vlm.path``, which reads no data."""

    vlm: PreTrainedModel
    codec: LatentCodec
    model_config: LatteFlowConfig
    prompts: PromptTokens | None


def compute_dtype(config: TrainingConfig) -> torch.dtype:
    """Return the dtype of the weights used for computing; the optimizer's master weights are always float32."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def build_components(config: TrainingConfig, images: Images, saved: Path) -> Components:
    """Build or load the VLM, its tokenizer, the codec and the network's configuration.

    Args:
        config: the run.
        images: its data, which determine the prompts and the image channels.
        saved: the run's model folder; if it exists and ``vlm.path`` is not given, the VLM and its tokenizer come from it.

    Raises:
        UserError: when a path is missing or the components do not fit together; the message names the field.
    """
    with naming():
        codec = _build_codec(config, images.image_channels)
        if isinstance(images, LatentDataset):
            images.check_codec(codec)
        with naming("vlm."):
            vlm, tokenizer = _build_vlm(config, images, saved)
        model_config = _make_model_config(config, vlm.config, codec)
        pipeline_config = _make_pipeline_config(config, images)
    own = pipeline_config.vlm_fingerprint
    if (saved / PIPELINE_FILE).is_file() and PipelineConfig.load(saved).vlm_fingerprint != own:
        raise UserError(
            f"vlm.path: {config.vlm.path} is not the VLM that {saved} was trained with (fingerprint differs)"
        )
    return Components(vlm.requires_grad_(False), tokenizer, codec, model_config, pipeline_config)


def build_meta_components(config: TrainingConfig) -> MetaComponents:
    """Build the VLM, the codec and the network's configuration on the meta device: no weights are read or initialised.

    Data are read only for the prompts of a tiny VLM. Otherwise the images are assumed to have their source's channels.

    Raises:
        UserError: as ``build_components``.
    """
    with naming():
        vlm_config: PretrainedConfig
        if config.vlm.path is None:
            images = load_image_dataset(config.data)
            image_channels = images.image_channels
            vlm_config, tokenizer = tiny_vlm_parts(config, images)
            null_prompt, limit = config.data.null_prompt, config.data.max_prompt_tokens
            prompts = PromptTokens(tokenizer, images.prompts, null_prompt=null_prompt, max_tokens=limit)
        else:
            image_channels = find_source(config.data.dataset).image_channels
            with naming("vlm."):
                vlm_config, prompts = read_vlm_config(_configuration_source(config.vlm.path)), None
        codec = _build_codec(config, image_channels, meta=True)
        with naming("vlm."), loading(config.vlm.path or "vlm.tiny"), torch.device("meta"):
            vlm = AutoModelForImageTextToText.from_config(vlm_config, trust_remote_code=False)
        model_config = _make_model_config(config, vlm_config, codec)
    return MetaComponents(vlm.requires_grad_(False), codec, model_config, prompts)


def build_model(
    config: TrainingConfig, components: Components, ranks: Ranks, initial: InitialWeights | None
) -> LatteFlowModel:
    """Build this rank's part of the network on the CPU, with the weights the run starts from.

    Random weights depend only on the run's seed.

    Args:
        config: the run.
        components: its components.
        ranks: which rank holds which part.
        initial: the weights that ``init_from`` names; None for the VLM's weights and random ones.

    Raises:
        UserError: when the initial weights do not fit this network.
    """
    torch.manual_seed(config.seed)
    model = LatteFlowModel.from_vlm(components.vlm, components.model_config)
    if initial is not None:
        initial.load(model)
    ranks.split_model(model)
    mark_universal(model, ranks.tensor_size)
    checkpoint_activations(model, config.activation_checkpointing)
    return model


def describe_run(model: LatteFlowModel, trained: int, images: Images, ranks: Ranks, layout: BatchLayout) -> str:
    """Return two lines: the network being trained and its number of trained parameters, and its data and batch layout."""
    whom = "ranks" if ranks.tensor_size == 1 else f"sets of {ranks.tensor_size} tensor-parallel ranks"
    experts = model.experts
    return (
        f"{model.config.variant}: {trained / 1e6:.2f} M trained parameters, {experts.num_groups} groups of "
        f"{experts.group_size} layers, attention by {model.config.attention_spec().backend}\n"
        f"{images.name}: {len(images)} images, {len(images.prompts)} prompts; batch {layout.global_batch_size} = "
        f"{layout.world_size} {whom} x {layout.micro_batch_size} x {layout.accumulation_steps} accumulation steps"
    )


def tiny_vlm_parts(config: TrainingConfig, images: Images) -> tuple[Qwen2VLConfig, PreTrainedTokenizerFast]:
    """Return the configuration and the tokenizer of the tiny VLM of a run without ``vlm.path``."""
    check_text([config.data.null_prompt])
    texts = itertools.chain(images.prompts, [config.data.null_prompt])
    tokenizer = build_tiny_tokenizer(texts, config.vlm.tiny.vocab_size)
    sizes = {name: value for name, value in vars(config.vlm.tiny).items() if name not in ("vocab_size", "seed")}
    return tiny_vlm_config(tokenizer, **sizes), tokenizer


def _build_vlm(config: TrainingConfig, images: Images, saved: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the VLM and its tokenizer from ``vlm.path`` or the run's model folder, or build the tiny one."""
    if config.vlm.path is not None:
        dtype = torch.float32 if config.model.variant == "blend" else compute_dtype(config)
        return load_vlm(config.vlm.path, dtype=dtype)
    if (saved / PIPELINE_FILE).is_file() and (saved / VLM_FOLDER).is_dir():
        # Not rebuilt from its seed: another version of torch might draw different weights.
        return load_vlm(saved / VLM_FOLDER, dtype=torch.float32, tokenizer_path=saved / TOKENIZER_FOLDER)
    if (saved / PIPELINE_FILE).is_file():  # a Blend, whose VLM is part of its weights
        vlm_config = LatteFlowConfig.from_pretrained(saved).vlm_config
        tokenizer = load_tokenizer(saved / TOKENIZER_FOLDER)
    else:
        vlm_config, tokenizer = tiny_vlm_parts(config, images)
    return build_tiny_vlm(vlm_config, config.vlm.tiny.seed), tokenizer


def _build_codec(config: TrainingConfig, image_channels: int, *, meta: bool = False) -> LatentCodec:
    """Load the codec and reject images it does not accept, before a VLM is loaded."""
    arguments: dict[str, Any] = asdict(config.codec) | {"image_channels": image_channels}
    with naming("codec."):
        if meta:
            path = codec_checkpoint(**arguments)
            arguments["path"] = path and _configuration_source(path)
        codec = load_codec(**arguments, dtype=compute_dtype(config), meta=meta)
    if codec.image_channels != image_channels:
        dataset = f"data.dataset {config.data.dataset}"
        raise UserError(f"codec: takes {codec.image_channels} image channels, {dataset} has {image_channels}")
    with naming("data."):
        codec.latent_size(config.data.resolution)
    return codec


def _configuration_source(path: str | Path) -> str | Path:
    """Return where a checkpoint's configuration is read from; for the presets' checkpoints, a bundled copy without download."""
    bundled = BUNDLED.get(str(path))
    return BACKBONES / bundled if bundled is not None and not Path(path).exists() else path


def _make_model_config(config: TrainingConfig, vlm_config: PretrainedConfig, codec: LatentCodec) -> LatteFlowConfig:
    """Return the network's configuration after checking that this run supports it."""
    model_config = LatteFlowConfig(
        vlm_config=vlm_config,
        latent_channels=codec.latent_channels,
        latent_size=codec.latent_size(config.data.resolution),
        **asdict(config.model),
    )
    check_tensor_parallel(model_config.text_config, config.tensor_parallel)
    if model_config.attention_spec().backend == "flash" and config.precision != "bf16":
        raise UserError(
            f"model.attention_backend: flash requires precision bf16, not {config.precision}; accepted: reference, sdpa"
        )
    return model_config


def _make_pipeline_config(config: TrainingConfig, images: Images) -> PipelineConfig:
    path = config.vlm.path
    settings = {
        "resolution": config.data.resolution,
        "image_channels": images.image_channels,
        "prompt_template": config.data.prompt_template,
        "null_prompt": config.data.null_prompt,
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "class_names": images.class_names,
        "codec": asdict(config.codec) | {"image_channels": images.image_channels},
        "vlm_path": str(Path(path).resolve()) if path is not None and Path(path).is_dir() else path,
        "vlm_fingerprint": None if path is None else fingerprint(checkpoint_folder(path)),
    }
    return read_settings(PipelineConfig, settings)
