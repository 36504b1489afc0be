"""Images: from tensors in [-1, 1] to bytes, PIL images and grids."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """Return images [B, c, R, R] in [-1, 1] as bytes [B, R, R] (grey, c = 1) or [B, R, R, 3]; values outside are clipped."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def make_grid(images: Sequence[np.ndarray], columns: int, *, scale: int = 1, margin: int = 2) -> np.ndarray:
    """Return equal-sized images side by side as one array of bytes.

    Args:
        images: arrays [R, R] or [R, R, 3].
        columns: images per row; the last row is padded with white.
        scale: side of the square that each pixel becomes.
        margin: white pixels between images.
    """
    images = [np.kron(image, np.ones((scale, scale) + (1,) * (image.ndim - 2), dtype=np.uint8)) for image in images]
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    shape = (rows * (height + margin) + margin, columns * (width + margin) + margin, *images[0].shape[2:])
    grid = np.full(shape, 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (margin + (i // columns) * (height + margin)), margin + (i % columns) * (width + margin)
        grid[top : top + height, left : left + width] = image
    return grid


def grid_scale(resolution: int) -> int:
    """Return the factor that enlarges small images to about 40 pixels, so that a person can see them."""
    return max(1, 40 // resolution)


def to_pil(image: np.ndarray) -> Image.Image:
    """Return an array of bytes [R, R] or [R, R, 3] as a PIL image."""
    return Image.fromarray(image)
