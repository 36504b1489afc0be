"""The training images: what they are and which prompt each of them has.

Every source becomes an ``ImageDataset``: map-style, images as tensors in [-1, 1], prompts as rows of one list of distinct user
messages, so that the context of a frozen VLM is computed once per distinct prompt and gathered by row.

Shapes: c image channels, R resolution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

from model.randomness import Stream, permutation
from training.config import DataConfig
from training.errors import UserError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_TRAIN_FRACTION = 0.7


@dataclass
class ImageDataset(Dataset):
    """Images with prompts.

    Attributes:
        name: for messages and logs.
        length: number of images.
        load: index -> image, [c, R, R] float32 in [-1, 1].
        prompt_rows: the row of ``prompts`` that each image has, [length].
        prompts: the distinct user messages.
        image_channels: c.
        class_names: names of the classes when the prompts are made of classes (row i is class i), else None.
        fingerprint: changes when the data does.
    """

    name: str
    length: int
    load: Callable[[int], Tensor]
    prompt_rows: Sequence[int]
    prompts: list[str]
    image_channels: int
    class_names: list[str] | None
    fingerprint: str

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.load(index), int(self.prompt_rows[index])


def digits_split() -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of scikit-learn's digits that train and those that are held out: 70 % and 30 %, always the same."""
    total = len(load_digits().target)
    order = permutation(0, Stream.DATA_ORDER, 0, total)
    train = int(total * DIGITS_TRAIN_FRACTION)
    return order[:train], order[train:]


def load_digits_dataset(config: DataConfig) -> ImageDataset:
    """Return the training part of scikit-learn's digits, 8x8 grey images; pixel values 0..16 become -1..1.

    Raises:
        UserError: when another resolution is asked for.
    """
    if config.resolution != 8:
        raise UserError(f"data.resolution: {config.resolution}; accepted with data.dataset digits: 8")
    digits = load_digits()
    train, _ = digits_split()
    images = torch.from_numpy(digits.images[train]).float()[:, None] / 8.0 - 1.0
    return ImageDataset(
        name="digits",
        length=len(train),
        load=lambda index: images[index],
        prompt_rows=digits.target[train],
        prompts=[config.prompt_template.format(name) for name in DIGIT_NAMES],
        image_channels=1,
        class_names=list(DIGIT_NAMES),
        fingerprint=f"scikit-learn digits, {len(train)} of {len(digits.target)}",
    )


def load_parquet_dataset(config: DataConfig) -> ImageDataset:
    """Return Parquet files with an image column and a column of captions or class labels, read through ``datasets``.

    Raises:
        UserError: when the path, a column or every image is missing, a file is damaged, or the image column holds no images.
    """
    import datasets  # costs a second to import; the digits preset does without
    import pyarrow.parquet

    if config.path is None or not Path(config.path).exists():
        raise UserError(f"data.path: {config.path} not found; accepted: a Parquet file, or a folder of them")
    path = Path(config.path)
    files = sorted(str(f) for f in path.glob("**/*.parquet")) if path.is_dir() else [str(path)]
    if not files:
        raise UserError(f"data.path: {path} holds no *.parquet file")
    num_images = 0
    for file in files:
        try:
            num_images += pyarrow.parquet.read_metadata(file).num_rows
        except (OSError, ValueError) as error:
            raise UserError(f"data.path: {file} is no Parquet file, or damaged: {error}") from error
    if num_images == 0:
        raise UserError(f"data.path: {path} holds zero images; at least one is needed")
    try:
        table = datasets.load_dataset("parquet", data_files=files, split="train")
    except datasets.exceptions.DatasetsError as error:
        raise UserError(f"data.path: cannot read {path}: {' '.join(str(error.__cause__ or error).split())}") from error
    for name, column in (("data.image_column", config.image_column), ("data.text_column", config.text_column)):
        if column not in table.column_names:
            raise UserError(f"{name}: {column!r} is not in {path}; accepted: {', '.join(table.column_names)}")
    label = table.features[config.text_column]
    texts = table[config.text_column]
    try:
        table = table.cast_column(config.image_column, datasets.Image(mode="RGB"))
        if table[0][config.image_column] is None:
            raise ValueError("the first one is empty")
    except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"data.image_column: {config.image_column!r} of {path} does not hold images: {error}"
        ) from error
    class_names = label.names if isinstance(label, datasets.ClassLabel) else None
    if class_names is not None:
        names, rows = list(class_names), list(texts)
    else:
        names = list(dict.fromkeys(texts))
        row_of = {text: row for row, text in enumerate(names)}
        rows = [row_of[text] for text in texts]

    def load(index: int) -> Tensor:
        image = table[index][config.image_column]
        if image.size != (config.resolution, config.resolution):
            image = image.resize((config.resolution, config.resolution))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0

    return ImageDataset(
        name=str(path),
        length=len(table),
        load=load,
        prompt_rows=rows,
        prompts=[config.prompt_template.format(name) for name in names],
        image_channels=3,
        class_names=class_names,
        fingerprint=table._fingerprint,
    )


LOADERS = {"digits": load_digits_dataset, "parquet": load_parquet_dataset}


def load_image_dataset(config: DataConfig) -> ImageDataset:
    """Return the training images that the configuration names.

    Raises:
        UserError: when they are missing, of the wrong size, or none.
    """
    dataset = LOADERS[config.dataset](config)
    if len(dataset) == 0:
        raise UserError(f"data.path: {config.path} holds zero images; at least one is needed")
    return dataset
