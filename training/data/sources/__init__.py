"""Sources of training images. Importing this package registers the package's own; ``register_source`` adds others."""

from latte_flow.training.data.sources import arrow_files, digits, hf, image_folder  # noqa: F401
from latte_flow.training.data.sources.table import SOURCES, detect_dataset, find_source, register_source

__all__ = ["SOURCES", "detect_dataset", "find_source", "register_source"]
