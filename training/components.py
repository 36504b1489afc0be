"""The parts of a run: the VLM, its tokenizer, the codec, the network's configuration, and the optimizer's parameter groups."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from latte_flow.model.backbone import (
    build_tiny_tokenizer,
    build_tiny_vlm,
    checkpoint_folder,
    fingerprint,
    load_vlm,
    tiny_vlm_config,
)
from latte_flow.model.codecs import load_codec
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.partition import check_tensor_parallel
from latte_flow.training.checkpoint.model_folder import PIPELINE_FILE, TOKENIZER_FOLDER, VLM_FOLDER, PipelineConfig
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.data.datasets import ImageDataset
from latte_flow.training.data.latents.dataset import LatentDataset
from latte_flow.training.errors import UserError, naming


def tiny_vlm_parts(config: TrainingConfig, images: ImageDataset):
    """Return the configuration and the tokenizer of the tiny VLM that a run without ``vlm.path`` builds."""
    tokenizer = build_tiny_tokenizer([*images.prompts, config.data.null_prompt], config.vlm.tiny.vocab_size)
    sizes = {name: value for name, value in vars(config.vlm.tiny).items() if name not in ("vocab_size", "seed")}
    return tiny_vlm_config(tokenizer, **sizes), tokenizer


def build_components(config: TrainingConfig, images: ImageDataset, saved: Path):
    """Build or load the VLM, its tokenizer, the codec and the network's configuration.

    Args:
        config: the run.
        images: its data, which gives the prompts and the image channels.
        saved: the run's model folder; where it exists, a VLM without a path of its own and its tokenizer are taken from it.

    Returns:
        (vlm, tokenizer, codec, LatteFlowConfig, PipelineConfig).

    Raises:
        UserError: when a path is missing or the parts do not fit together; the message names the field.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    codec_arguments = {
        "kind": config.codec.kind,
        "path": config.codec.path,
        "preset": config.codec.preset,
        "scaling_factor": config.codec.scaling_factor,
        "image_channels": images.image_channels,
        "patch": config.codec.patch,
    }
    try:
        with naming("codec"):
            codec = load_codec(**codec_arguments, dtype=dtype)
        if codec.image_channels != images.image_channels:
            raise UserError(
                f"codec: takes {codec.image_channels} image channels, data.dataset {images.name} has {images.image_channels}"
            )
        with naming("data"):
            latent_size = codec.latent_size(config.data.resolution)
        if isinstance(images, LatentDataset):
            images.check_codec(codec)
        if config.vlm.path is None and (saved / PIPELINE_FILE).is_file() and (saved / VLM_FOLDER).is_dir():
            # Not built again from its seed: another version of torch might draw other weights.
            with naming("vlm"):
                vlm, tokenizer = load_vlm(saved / VLM_FOLDER, torch.float32, saved / TOKENIZER_FOLDER)
        elif config.vlm.path is None:
            vlm_config, tokenizer = tiny_vlm_parts(config, images)
            if (saved / PIPELINE_FILE).is_file():  # of a Blend, whose VLM is part of its weights
                vlm_config = LatteFlowConfig.from_pretrained(saved).vlm_config
                tokenizer = AutoTokenizer.from_pretrained(saved / TOKENIZER_FOLDER)
            vlm = build_tiny_vlm(vlm_config, config.vlm.tiny.seed)
        else:
            vlm_dtype = torch.float32 if config.model["variant"] == "blend" else dtype
            with naming("vlm"):
                vlm, tokenizer = load_vlm(config.vlm.path, dtype=vlm_dtype)
        model_config = LatteFlowConfig(
            vlm_config=vlm.config, latent_channels=codec.latent_channels, latent_size=latent_size, **config.model
        )
        check_tensor_parallel(model_config.text_config, config.tensor_parallel)
        if model_config.attention_spec().backend == "flash" and config.precision != "bf16":
            raise UserError(
                f"model.attention_backend: flash takes precision bf16, not {config.precision}; accepted: reference, sdpa"
            )
    except UserError:
        raise
    except ValueError as error:  # the model's own checks name the field and what is accepted
        raise UserError(str(error)) from error
    is_folder = config.vlm.path is not None and Path(config.vlm.path).is_dir()
    vlm_fingerprint = None if config.vlm.path is None else fingerprint(checkpoint_folder(config.vlm.path))
    if (saved / PIPELINE_FILE).is_file():
        trained_with = PipelineConfig.load(saved).vlm_fingerprint
        if trained_with != vlm_fingerprint:
            raise UserError(
                f"vlm.path: {config.vlm.path} is not the VLM that {saved} was trained with (fingerprint differs)"
            )
    pipeline_config = PipelineConfig(
        resolution=config.data.resolution,
        image_channels=images.image_channels,
        prompt_template=config.data.prompt_template,
        null_prompt=config.data.null_prompt,
        max_prompt_tokens=config.data.max_prompt_tokens,
        class_names=images.class_names,
        codec=codec_arguments,
        vlm_path=str(Path(config.vlm.path).resolve()) if is_folder else config.vlm.path,
        vlm_fingerprint=vlm_fingerprint,
    )
    return vlm.requires_grad_(False), tokenizer, codec, model_config, pipeline_config
