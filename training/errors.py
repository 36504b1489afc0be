"""Errors that a user can mend: they end a program with one line instead of a traceback."""


class UserError(ValueError):
    """A wrong configuration, a missing file, a checkpoint of another model. The message names the field or file and what fits."""
