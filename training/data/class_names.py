"""Names of classes, for prompts: those of ImageNet-1k, those of a file, or those of the data set itself."""

import logging
import re
from pathlib import Path

from latte_flow.training.errors import UserError

logger = logging.getLogger(__name__)

IMAGENET = "imagenet-1k"
WNID = re.compile(r"n\d{8}")


def imagenet_names() -> list[str]:
    """Return the 1000 names of ImageNet-1k in the order of its classes; the file says where they are from."""
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def resolve_class_names(wanted: str | None, own: list[str]) -> list[str]:
    """Return the names that prompts are made of, in the order of the classes.

    Args:
        wanted: data.class_names: ``imagenet-1k``; a text file with a name a line, or lines "OWN_NAME name, synonyms" such as
            ImageNet's LOC_synset_mapping.txt; None for ImageNet's names when the classes are its 1000 WordNet ids, and otherwise
            the data set's own.
        own: the data set's names: folders, ClassLabel names or numbers.

    Raises:
        UserError: when the file is missing, or the names do not fit the classes.
    """
    if wanted is not None and wanted != IMAGENET:
        return _names_from_file(Path(wanted), own)
    is_imagenet = len(own) == 1000 and own == sorted(own) and all(WNID.fullmatch(name) for name in own)
    if wanted is None and not is_imagenet:
        if own and all(WNID.fullmatch(name) for name in own):
            logger.warning(
                "the %d classes are named by WordNet ids (%s, ...) and are not ImageNet-1k's 1000: prompts are made of the ids; "
                "data.class_names takes a file of names, such as LOC_synset_mapping.txt",
                len(own),
                own[0],
            )
        return own
    if len(own) != 1000:
        raise UserError(
            f"data.class_names: {IMAGENET} has 1000 classes, the data has {len(own)}; accepted: a file of names"
        )
    return imagenet_names()


def _names_from_file(path: Path, own: list[str]) -> list[str]:
    if not path.is_file():
        raise UserError(f"data.class_names: {path} not found; accepted: {IMAGENET}, or a text file with a name a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:  # unreadable, or no text
        raise UserError(f"data.class_names: {path} cannot be read: {error}; accepted: a text file in UTF-8") from error
    keyed = {key: rest.split(",")[0].strip() for key, _, rest in (line.partition(" ") for line in lines)}
    if all(name in keyed and keyed[name] for name in own):
        return [keyed[name] for name in own]
    if len(lines) != len(own):
        raise UserError(
            f"data.class_names: {path} has {len(lines)} lines for {len(own)} classes; accepted: a name a line in the order of "
            "the classes, or a line 'FOLDER name' for each of them"
        )
    return lines
