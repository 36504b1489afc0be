"""From image bytes to a tensor: decoding, cropping, and handling of images that cannot be decoded.

Shapes: c image channels, R resolution.
"""

import logging
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from latte_flow.training.errors import UserError

logger = logging.getLogger(__name__)

# What Pillow raises on bytes that are not a complete image: missing and truncated files, unknown formats (OSError),
# broken PNG chunks (SyntaxError, struct.error), broken streams, neither bytes nor a path (ValueError), absurd sizes.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Accepted formats. Pillow supports more and detects them by content, not name: EPS starts Ghostscript, others are obscure."""
MAX_ASPECT = 50
MAX_PIXELS = 100_000_000
"""Beyond these limits the center crop is a sliver of the image, and upscaling its shorter side can exhaust memory."""


class BrokenImageError(Exception):
    """An image that cannot be decoded."""


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Resize the shorter side of an image to the resolution and crop the central square.

    Follows ADM for ImageNet, and DiT after it (openai/guided-diffusion, image_datasets.py, center_crop_arr): while the shorter
    side is at least twice the resolution, the image is halved with a box filter, which averages every pixel; one bicubic resize
    does the rest. Published FIDs compare models trained on this crop.

    Args:
        image: an image of any size.
        resolution: side of the result in pixels.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def decode_image(value: dict, resolution: int) -> Tensor:
    """Return an image as a tensor [3, R, R] float32 in [-1, 1], cropped by ``center_crop``.

    EXIF rotation is applied. The alpha channel is dropped, which keeps the colours under it. 16-bit and float images are scaled.

    Args:
        value: a value of an Image column of ``datasets``: {"bytes": ..., "path": ...}, one of them possibly None.
        resolution: R.

    Raises:
        BrokenImageError: when it cannot be decoded, is not in one of FORMATS, or exceeds the size or aspect limit.
    """
    try:
        if value is None:
            raise ValueError("no image in this row")
        with Image.open(_stream_of(value), formats=FORMATS) as image:
            width, height = image.size  # known before the pixels are decoded
            if max(width, height) > MAX_ASPECT * min(width, height) or width * height > MAX_PIXELS:
                raise ValueError(
                    f"{width} x {height} pixels; accepted: aspect ratios up to {MAX_ASPECT}, and up to {MAX_PIXELS:,} pixels"
                )
            image.load()
            turned = ImageOps.exif_transpose(image)
        cropped = center_crop(_to_rgb(turned), resolution)
    except DECODING_ERRORS as error:
        reason = str(error).split(" <_io.")[0]  # Pillow prints the address of the buffer, which differs between runs
        raise BrokenImageError(f"{type(error).__name__}: {reason}") from error
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1.0


def _stream_of(value: dict) -> BytesIO | str:
    """Return the bytes of an image, or the path of a local regular file: nothing else is opened."""
    if value["bytes"] is not None:
        return BytesIO(value["bytes"])
    path = value["path"]
    if path is None:
        raise ValueError("neither bytes nor a path")
    if not Path(path).is_file():
        raise ValueError(f"{path!r} is not a regular file; accepted: bytes, or the path of a local file")
    return path


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an RGB image with 8 bits per channel. Pillow itself would clip 16-bit and float images to white and black."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image if image.mode == "RGB" else image.convert("RGB")
    pixels = np.asarray(image, dtype=np.float64)
    low, high = pixels.min(), pixels.max()
    limit = 65535.0 if image.mode != "F" else 1.0 if high <= 1 else 255.0
    if not 0 <= low <= high <= limit:  # NaN fails too
        raise ValueError(f"mode {image.mode} with values from {low} to {high}; accepted: 0 to {limit:g}")
    return Image.fromarray(np.rint(pixels * (255 / limit)).astype(np.uint8)).convert("RGB")


@dataclass
class ImageDataset(Dataset):
    """Images with prompts.

    An image that cannot be decoded is replaced by the next one that can. Every index therefore has an image, and the image of a
    training sample does not depend on which ones were found broken before.

    Attributes:
        name: for messages and logs.
        length: number of images.
        load: index -> image, [c, R, R] float32 in [-1, 1]; raises BrokenImageError.
        prompt_rows: the row of each image's prompt in ``prompts``, [length].
        prompts: the distinct user messages.
        image_channels: c.
        class_names: class names if the prompts are made from classes (row i is class i), otherwise None.
        fingerprint: changes when the data change.
        captions: the texts the prompts are made from: the name of class i, or the i-th distinct caption.
        describe: index -> location of the image, for messages.
        max_broken: number of broken images that are tolerated.
        broken: [length] bool, images found broken; shared by the worker processes of a rank.
    """

    name: str
    length: int
    load: Callable[[int], Tensor]
    prompt_rows: Sequence[int] | np.ndarray
    prompts: Sequence[str]
    image_channels: int
    class_names: list[str] | None
    fingerprint: str
    captions: Sequence[str] = ()
    describe: Callable[[int], str] | None = None
    max_broken: int = 0
    broken: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        self.broken = torch.zeros(self.length, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image at an index, or its replacement, and the row of its prompt."""
        image, source = self.fetch(index)
        return image, int(self.prompt_rows[source])

    def sample(self, index: int, *, flip: bool) -> dict:
        """Return {"image": [c, R, R], mirrored if ``flip``, "row": row of its prompt}."""
        image, row = self[index]
        return {"image": image.flip(-1) if flip else image, "row": row}

    def fetch(self, index: int) -> tuple[Tensor, int]:
        """Return the image at an index and its own index: the same, or that of the next image that is not broken.

        Raises:
            UserError: when more than ``max_broken`` images have been found broken.
        """
        for source in chain(range(index, self.length), range(index)):
            if self.broken[source]:
                continue
            try:
                return self.load(source), source
            except BrokenImageError as error:
                self._count_broken(source, error)
        raise UserError(f"data.path: no image of {self.name} can be decoded")

    def reason_broken(self, index: int) -> str:
        """Return the reason why an image found broken cannot be decoded."""
        try:
            self.load(index)
        except BrokenImageError as error:
            return str(error)
        return "can be decoded now, but could not before"

    def _count_broken(self, index: int, error: BrokenImageError) -> None:
        self.broken[index] = True
        where = self.describe(index) if self.describe else f"image {index}"
        logger.warning("broken image %s skipped: %s", where, error)
        count = int(self.broken.sum())
        if count > self.max_broken:
            raise UserError(
                f"data.max_broken_fraction: {count} broken images in {self.name}, the last is {where} ({error}); accepted: at "
                f"most {self.max_broken} of {self.length}"
            )
