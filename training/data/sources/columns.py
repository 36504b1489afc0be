"""The image column and the caption or class column of a table, read through Arrow: Python objects of millions take GBs."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.class_names import resolve_class_names
from latte_flow.training.data.images import BrokenImageError, decode_image
from latte_flow.training.data.prompts import StoredTexts
from latte_flow.training.errors import UserError

logger = logging.getLogger(__name__)

AUTO = "auto"
TEXT_COLUMNS = ("text", "caption", "txt", "label", "cls")
MAX_CLASSES = 100_000
"""Limit for a column of class numbers without names: a prompt is made for every number up to the largest."""


def find_image_column(table: Any, config: DataConfig) -> str:
    """Return the name of the image column of a ``datasets.Dataset``.

    Raises:
        UserError: when data.image_column is not there, or auto and there are several.
    """
    import datasets

    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    wanted, columns = config.image_column, ", ".join(table.column_names)
    if wanted == AUTO:
        if len(found) != 1 and "image" not in table.column_names:
            raise UserError(
                f"data.image_column: {AUTO}, but {config.path} has {len(found)} image columns; accepted: one of {columns}"
            )
        return "image" if "image" in table.column_names else found[0]
    if wanted not in table.column_names:
        raise UserError(f"data.image_column: {wanted!r} is not in {config.path}; accepted: {columns}")
    return wanted


def undecoded_images(table: Any, image_column: str, config: DataConfig) -> Any:
    """Return the image column undecoded, as bytes: decoding happens later, where a broken image can be told from a bug.

    Raises:
        UserError: when the column does not hold images.
    """
    import datasets

    is_image = isinstance(table.features[image_column], datasets.Image)
    try:
        images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        if not is_image:  # the type allows bytes or paths; the first value is checked
            decode_image(images[0][image_column], resolution=1)
    except (ValueError, TypeError, pa.ArrowException, BrokenImageError) as error:
        raise UserError(
            f"data.image_column: {image_column!r} of {config.path} does not hold images ({one_line(error)}); accepted: a column "
            "of them"
        ) from error
    return images


def read_captions(table: Any, config: DataConfig) -> tuple[Sequence[str], np.ndarray, list[str] | None]:
    """Return the distinct captions or class names, the row of each image's, and the names again if they are classes.

    Raises:
        UserError: when data.text_column is not there, or a row holds neither a caption nor a class.
    """
    import datasets

    column = _text_column(table, config)
    feature = table.features[column]
    values = table.select_columns([column]).with_format("arrow")[:].column(column)
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if not (is_text or pa.types.is_integer(values.type)):
        raise _invalid_row(values, 0, column, config)
    if values.null_count:
        raise _invalid_row(values, pc.index(pc.is_null(values), True).as_py(), column, config)
    if is_text:
        if config.class_names is not None:
            raise UserError(
                f"data.class_names: {column} of {config.path} holds captions; accepted: null, or another text_column"
            )
        # large_string: offsets of 64 bits, for more than 2 GiB of captions.
        encoded = values.cast(pa.large_string()).dictionary_encode().combine_chunks()
        pa.default_memory_pool().release_unused()  # the hash table of all captions
        return StoredTexts(encoded.dictionary), encoded.indices.to_numpy(), None
    limits = pc.min_max(values).as_py()
    if limits["min"] < 0:
        raise _invalid_row(values, pc.index(pc.less(values, 0), True).as_py(), column, config)
    if isinstance(feature, datasets.ClassLabel):
        own = list(feature.names)
    else:
        if limits["max"] >= MAX_CLASSES:
            row = pc.index(values, pa.scalar(limits["max"], values.type)).as_py()
            raise UserError(
                f"data.text_column: {column} of row {row} of {config.path} is class {limits['max']}; accepted: less than "
                f"{MAX_CLASSES:,}, or a column with the names of its classes"
            )
        own = [str(number) for number in range(limits["max"] + 1)]
        if config.class_names is None:
            logger.warning("%s has classes without names: prompts will use their numbers; see data.class_names", column)
    names = resolve_class_names(config.class_names, own)
    return names, values.to_numpy(), names


def _text_column(table: Any, config: DataConfig) -> str:
    column, columns = config.text_column, ", ".join(table.column_names)
    if column == AUTO:
        column = next((name for name in TEXT_COLUMNS if name in table.column_names), "")
        if not column:
            raise UserError(
                f"data.text_column: {AUTO}, but none of {', '.join(TEXT_COLUMNS)} is in {config.path}; accepted: one of "
                f"{columns}, with captions or classes (an image folder needs at least two class folders, or a metadata.jsonl)"
            )
    if column not in table.column_names:
        raise UserError(f"data.text_column: {column!r} is not in {config.path}; accepted: {columns}")
    return column


def _invalid_row(values: pa.ChunkedArray, row: int, column: str, config: DataConfig) -> UserError:
    return UserError(
        f"data.text_column: {column} of row {row} of {config.path} is {values[row].as_py()!r}; accepted: a caption or a class in "
        "every row"
    )


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks."""
    return " ".join(str(error).split())
