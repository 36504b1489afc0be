"""Class names for prompts: from ImageNet-1k, from a file, or from the data set itself."""

import logging
import re
from collections import Counter
from pathlib import Path

from latte_flow.training.errors import UserError

logger = logging.getLogger(__name__)

IMAGENET = "imagenet-1k"
WNID = re.compile(r"n\d{8}")


def imagenet_names() -> list[str]:
    """Return the 1000 class names of ImageNet-1k in class order; the file names its source."""
    lines = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def resolve_class_names(wanted: str | None, own: list[str]) -> list[str]:
    """Return the class names to use in prompts, in class order.

    Args:
        wanted: data.class_names: ``imagenet-1k``; a text file with one name per line, or with lines "OWN_NAME name, synonyms"
            such as ImageNet's LOC_synset_mapping.txt; None for ImageNet's names if the classes are its 1000 WordNet ids,
            otherwise the data set's own names.
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
                "the %d classes are named by WordNet ids (%s, ...) and are not ImageNet-1k's 1000: prompts will use the ids; "
                "data.class_names accepts a file of names, such as LOC_synset_mapping.txt",
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
        raise UserError(
            f"data.class_names: {path} not found; accepted: {IMAGENET}, or a text file with one name per line"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # without a byte order mark, which editors on Windows write
    except (OSError, ValueError) as error:  # unreadable, or not text
        raise UserError(f"data.class_names: {path} cannot be read: {error}; accepted: a text file in UTF-8") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    names = _names_of_mapping(path, lines, own) or lines
    if len(names) != len(own):
        raise UserError(
            f"data.class_names: {path} has {len(lines)} lines for {len(own)} classes; accepted: one name per line in the "
            "order of the classes, or a line 'FOLDER name' for each of them"
        )
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        logger.warning("%s: several classes have the same name, and so the same prompt: %s", path, ", ".join(repeated))
    return names


def _names_of_mapping(path: Path, lines: list[str], own: list[str]) -> list[str] | None:
    """Return the names in a file with lines "OWN_NAME name, synonyms"; None if its lines are names.

    Raises:
        UserError: when a class has no line. Taken for names, the lines would be wrong prompts.
    """
    words = [line.split(maxsplit=1) for line in lines]
    keyed = {key: rest[0].split(",")[0].strip() if rest else "" for key, *rest in words}
    missing = [name for name in own if not keyed.get(name)]
    if not missing:
        return [keyed[name] for name in own]
    by_wnid = any(WNID.fullmatch(key) for key in keyed)
    if by_wnid and set(own) <= set(keyed.values()):
        return own  # latents whose classes were named by this file when they were encoded
    partial = len(missing) < len(own) and all(len(line) > 1 for line in words)
    if by_wnid or partial:
        more = f" and {len(missing) - 1} more of the {len(own)} classes" if missing[1:] else ""
        raise UserError(
            f"data.class_names: {path} has no name for {missing[0]}{more}; accepted: a line 'FOLDER name' for each class, or one "
            "name per line in the order of the classes"
        )
    return None
