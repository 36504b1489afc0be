"""Two-dimensional rotary position embedding of the generated image's tokens (paper Appendix A).

Half of each head's dimensions rotate by the token's row, half by its column. The layout follows the rotate-half
convention of transformers' ``apply_rotary_pos_emb`` (dimension i is paired with i + E/2), so both kinds of position, this
one and the language model's multimodal RoPE, are applied by the same function.

Shapes: N = height * width image tokens in row-major order, E head_dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latte_flow.model.errors import ArgumentError

POSITION_BUFFERS = ("inv_freq", "original_inv_freq", "image_cos", "image_sin")
"""Buffers that positions are computed from: transformers' rotary frequencies, and LatteFlowModel's cosines and sines."""


def rotary_2d(height: int, width: int, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [N, E] in float32, of the 2D rotary embedding.

    Frequency j of an axis is theta^(-j / (E/4)), j = 0 .. E/4 - 1; pairs (i, i + E/2) with i < E/4 rotate by the row, the
    others by the column.

    Raises:
        ArgumentError: when head_dim is not a multiple of 4 (two axes, two dimensions per rotation).
    """
    if head_dim % 4:
        raise ArgumentError(f"head_dim: {head_dim} is not a multiple of 4, which a rotary embedding of two axes needs")
    frequencies = theta ** (-torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1) * frequencies for axis in (row, column)], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


@contextmanager
def float32_positions(model: nn.Module) -> Iterator[None]:
    """Keep what a model computes positions from in float32 while it is cast or moved to another device.

    In bf16 the frequencies are off by 0.4 %: at position 1000 an angle is off by radians. A cast of a VLM by
    itself, ``pipeline.vlm.half()``, is transformers' own and does round them: cast the pipeline.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in POSITION_BUFFERS and buffer.device.type != "meta"
    ]
    yield
    for module, name, buffer in kept:
        setattr(module, name, buffer.to(module.get_buffer(name).device))
