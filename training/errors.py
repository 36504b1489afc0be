"""Errors that a user can mend: they end a program with one line instead of a traceback."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A wrong configuration, a missing file, a checkpoint of another model. The message names the field or file and what fits."""


def exit_code(program: Callable[[], None]) -> int:
    """Run a program; return 0, or 2 after an error that the user can mend, said in one line by the first rank."""
    try:
        program()
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:  # every rank of a launch finds the same error
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
