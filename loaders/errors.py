"""What can be wrong with data: the whole set, or one image of it."""


class DataError(ValueError):
    """Data that cannot be used; one line that names the path, what was expected and what to do."""

    exit_code = 2


class LoaderError(RuntimeError):
    """Something of the machine that a loader needs failed: a decoder, its memory, one of its processes. Not a fault of
    any image."""

    exit_code = 6


class BadImage(Exception):
    """One image that cannot be decoded; the message is the reason, without the path."""
