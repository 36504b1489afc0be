"""Files that are part of the package, found by name also where there is no checkout: presets and DeepSpeed's configurations."""

from pathlib import Path

import latte_flow
from latte_flow.training.errors import UserError

PACKAGE = Path(latte_flow.__file__).parent


def find_file(field: str, given: str, folder: str, suffix: str) -> Path:
    """Return the file at the path ``given``; where there is none, the bundled one of that name.

    Args:
        field: what the file is given for, to name it in errors.
        given: a path; or a bundled file's name, with or without its suffix (``zero2``), or its path in a checkout.
        folder: of the bundled files, in a checkout.
        suffix: theirs.

    Raises:
        UserError: when there is neither; it lists the bundled names.
    """
    if Path(given).is_file():  # no device or pipe, which may have no end
        return Path(given)
    bundled = sorted((PACKAGE / folder).glob(f"*{suffix}"))
    for file in bundled:
        if given in (file.stem, file.name, f"{folder}/{file.name}"):
            return file
    kind, names = suffix[1:].upper(), ", ".join(file.name for file in bundled)
    raise UserError(f"{field}: {given} not found; accepted: a {kind} file, or one of {folder}: {names}")
