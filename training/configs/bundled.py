"""Files bundled with the package, found by name without a checkout too: presets and DeepSpeed configurations."""

from pathlib import Path

import latte_flow
from latte_flow.training.errors import UserError

PACKAGE = Path(latte_flow.__file__).parent


def find_file(field: str, given: str, folder: str, suffix: str) -> Path:
    """Return the file at the path ``given``, or the bundled file of that name if there is none.

    Args:
        field: the field that takes the file, for error messages.
        given: a path; or a bundled file's name, with or without its suffix (``zero2``), or its path in a checkout.
        folder: folder of the bundled files in a checkout.
        suffix: suffix of the bundled files.

    Raises:
        UserError: when neither exists; it lists the bundled names.
    """
    if Path(given).is_file():  # not a device or pipe, which may never end
        return Path(given)
    bundled = sorted((PACKAGE / folder).glob(f"*{suffix}"))
    for file in bundled:
        if given in (file.stem, file.name, f"{folder}/{file.name}"):
            return file
    kind, names = suffix[1:].upper(), ", ".join(file.name for file in bundled)
    raise UserError(f"{field}: {given} not found; accepted: a {kind} file, or one of {folder}: {names}")
