"""The table of data sources: what ``data.dataset`` names. It is open from outside."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latte_flow.model.tables import enter, look_up
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.images import ImageDataset
from latte_flow.training.data.latents.dataset import LatentDataset, load_latent_dataset
from latte_flow.training.errors import UserError, naming

Loader = Callable[[DataConfig], ImageDataset | LatentDataset]


@dataclass(frozen=True)
class Source:
    """One kind of data.

    Attributes:
        load: reads the data of a configuration; raises UserError, naming the field, when they are missing or damaged.
        recognises: whether a file or folder is of this kind, for tools/encode_latents.py.
        image_channels: c, for a dry run that reads no data.
        encoded: whether it gives latents instead of images.
    """

    load: Loader
    recognises: Callable[[Path], bool]
    image_channels: int
    encoded: bool


SOURCES: dict[str, Source] = {}
"""Name (``data.dataset``) -> source."""


def register_source(
    name: str,
    *,
    recognises: Callable[[Path], bool] = lambda path: False,
    image_channels: int = 3,
    encoded: bool = False,
) -> Callable[[Loader], Loader]:
    """Enter the function that loads a source into the table; the arguments are the attributes of ``Source``.

    Raises:
        ValueError: when the name is taken.
    """

    def register(load: Loader) -> Loader:
        enter(SOURCES, name, Source(load, recognises, image_channels, encoded))
        return load

    return register


register_source("latents", encoded=True)(load_latent_dataset)


def find_source(name: str) -> Source:
    """Return the source that data.dataset names.

    Raises:
        UserError: when there is none.
    """
    with naming("data."):
        return look_up(SOURCES, name, "dataset")


def detect_dataset(path: Path) -> str:
    """Return the value of data.dataset for a path.

    Raises:
        UserError: when the path does not exist.
    """
    if not path.exists():
        raise UserError(f"source: {path} not found; accepted: digits, or a folder or file of images")
    return next((name for name, source in reversed(SOURCES.items()) if source.recognises(path)), "imagefolder")
