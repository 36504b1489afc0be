"""Tiny random models of the real classes, written as checkpoint folders."""

from pathlib import Path

import torch
from diffusers import AutoencoderDC

TINY_SCALING_FACTOR = 0.4


def save_tiny_dc_ae(folder: Path, *, seed: int = 0, scaling_factor: float = TINY_SCALING_FACTOR) -> Path:
    """Write a random AutoencoderDC that downsamples by 4 to 8 channels, with both kinds of blocks of the real one."""
    torch.manual_seed(seed)
    autoencoder = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
        decoder_act_fns=("relu", "relu", "silu"),
        scaling_factor=scaling_factor,
    )
    autoencoder.save_pretrained(folder)
    return folder
