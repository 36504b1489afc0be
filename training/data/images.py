"""From the bytes of a picture to a tensor: decoding, cropping, and what happens to pictures that cannot be decoded.

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

# What Pillow raises on bytes that are no whole picture: missing and truncated files, unknown formats (OSError),
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
"""What is decoded. Pillow knows more, and chooses by the content, not the name: EPS starts Ghostscript, others are obscure."""
MAX_ASPECT = 50
MAX_PIXELS = 100_000_000
"""Beyond, the square in the middle is a sliver of the picture, and scaling one side up to the resolution fills the memory."""


class BrokenImageError(Exception):
    """A picture that cannot be decoded."""


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Scale the shorter side of a picture to the resolution and cut out the square in the middle.

    As ADM does it for ImageNet, and DiT after it (openai/guided-diffusion, image_datasets.py, center_crop_arr): while the shorter
    side is at least twice the resolution the picture is halved with a box filter, which averages every pixel; the rest of the way
    is one bicubic resize. FIDs are compared between models trained on this crop.

    Args:
        image: a picture of any size.
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
    """Return a picture as a tensor [3, R, R] float32 in [-1, 1], cropped by ``center_crop``.

    It is turned as its EXIF says. Transparency is dropped: the colours under it show. 16-bit and float pictures are scaled.

    Args:
        value: what an Image column of ``datasets`` holds: {"bytes": ..., "path": ...}, one of them possibly None.
        resolution: R.

    Raises:
        BrokenImageError: when it cannot be decoded, is none of FORMATS, or is of a shape that no square can be cut from.
    """
    try:
        if value is None:
            raise ValueError("no picture in this row")
        with Image.open(_stream_of(value), formats=FORMATS) as image:
            width, height = image.size  # known before the pixels are decoded
            if max(width, height) > MAX_ASPECT * min(width, height) or width * height > MAX_PIXELS:
                raise ValueError(
                    f"{width} x {height} pixels; accepted: sides of at most 1 to {MAX_ASPECT}, and {MAX_PIXELS:,} pixels"
                )
            image.load()
            turned = ImageOps.exif_transpose(image)
        cropped = center_crop(_to_rgb(turned), resolution)
    except DECODING_ERRORS as error:
        reason = str(error).split(" <_io.")[0]  # Pillow prints the address of the buffer: another one in every run
        raise BrokenImageError(f"{type(error).__name__}: {reason}") from error
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1.0


def _stream_of(value: dict) -> BytesIO | str:
    """Return the bytes of a picture, or the path of a regular file of this machine: nothing else is opened."""
    if value["bytes"] is not None:
        return BytesIO(value["bytes"])
    path = value["path"]
    if path is None:
        raise ValueError("neither bytes nor a path")
    if not Path(path).is_file():
        raise ValueError(f"{path!r} is no regular file here; accepted: bytes, or the path of a local file")
    return path


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture with 8 bits a channel. Pillow itself would clip 16-bit and float pictures to white and black."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image if image.mode == "RGB" else image.convert("RGB")
    pixels = np.asarray(image, dtype=np.float64)
    low, high = pixels.min(), pixels.max()
    limit = 65535.0 if image.mode != "F" else 1.0 if high <= 1 else 255.0
    if not 0 <= low <= high <= limit:  # NaN is not either
        raise ValueError(f"mode {image.mode} with values from {low} to {high}; accepted: 0 to {limit:g}")
    return Image.fromarray(np.rint(pixels * (255 / limit)).astype(np.uint8)).convert("RGB")


@dataclass
class ImageDataset(Dataset):
    """Images with prompts.

    An image that cannot be decoded is replaced by the next one that can, so that every index has an image and which images a
    training sample draws does not depend on what was found broken before.

    Attributes:
        name: for messages and logs.
        length: number of images.
        load: index -> image, [c, R, R] float32 in [-1, 1]; raises BrokenImageError.
        prompt_rows: the row of ``prompts`` that each image has, [length].
        prompts: the distinct user messages.
        image_channels: c.
        class_names: names of the classes when the prompts are made of classes (row i is class i), else None.
        fingerprint: changes when the data does.
        captions: what the prompts are made of: the name of class i, or the i-th distinct caption.
        describe: index -> where the image is, for messages.
        max_broken: how many broken images are put up with.
        broken: [length] bool, which images were found broken; shared by the worker processes of a rank.
    """

    name: str
    length: int
    load: Callable[[int], Tensor]
    prompt_rows: Sequence[int]
    prompts: list[str]
    image_channels: int
    class_names: list[str] | None
    fingerprint: str
    captions: list[str] = field(default_factory=list)
    describe: Callable[[int], str] | None = None
    max_broken: int = 0
    broken: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        self.broken = torch.zeros(self.length, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image of an index, or its replacement, and the row of its prompt."""
        image, source = self.fetch(index)
        return image, int(self.prompt_rows[source])

    def sample(self, index: int, *, flip: bool) -> dict:
        """Return {"image": [c, R, R], mirrored or not, "row": row of its prompt}."""
        image, row = self[index]
        return {"image": image.flip(-1) if flip else image, "row": row}

    def fetch(self, index: int) -> tuple[Tensor, int]:
        """Return the image of an index and the index it is of: the same, or that of the next image that is not broken.

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
        raise UserError(f"data.path: {self.name} holds no image that can be decoded")

    def reason_broken(self, index: int) -> str:
        """Return why an image that was found broken cannot be decoded."""
        try:
            self.load(index)
        except BrokenImageError as error:
            return str(error)
        return "can be decoded now, but could not be before"

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
