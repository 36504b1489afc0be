"""The error that model/ raises for what a user can fix."""


class ArgumentError(ValueError):
    """An argument, file or checkpoint that does not fit. The message names it and what is accepted.

    A plain ValueError is a bug, in this package or below it: callers that turn an ArgumentError into one line let it pass.
    """
