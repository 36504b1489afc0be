"""scikit-learn's handwritten digits, split into a training and a held-out part."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from latte_flow.model.randomness import Stream, permutation
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.images import ImageDataset
from latte_flow.training.data.sources.table import register_source
from latte_flow.training.errors import UserError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_TRAIN_FRACTION = 0.7


def digits_split() -> tuple[np.ndarray, np.ndarray]:
    """Return the training (70 %) and held-out (30 %) indices of scikit-learn's digits; the split is fixed."""
    total = len(load_digits().target)
    order = permutation(0, Stream.DATA_ORDER, 0, total)
    train = int(total * DIGITS_TRAIN_FRACTION)
    return order[:train], order[train:]


@register_source("digits", image_channels=1)
def load_digits_dataset(config: DataConfig) -> ImageDataset:
    """Return the training split of scikit-learn's digits, 8x8 grey images; pixel values 0..16 become -1..1.

    Raises:
        UserError: when the configured resolution is not 8.
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
        captions=list(DIGIT_NAMES),
    )
