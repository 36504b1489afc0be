"""The training data: images or latents, and the prompt of each.

Every source becomes a map-style data set whose ``sample`` returns an image in [-1, 1] (or a latent) and the row of its prompt in
a list of distinct user messages, so that the context of a frozen VLM is computed once per distinct prompt and gathered by row.
"""

from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.images import ImageDataset
from latte_flow.training.data.latents.dataset import LatentDataset
from latte_flow.training.data.sources import find_source


def load_image_dataset(config: DataConfig) -> ImageDataset | LatentDataset:
    """Return the training data of a configuration.

    Raises:
        UserError: when they are missing, incomplete, of the wrong size, or empty.
    """
    return find_source(config.dataset).load(config)
