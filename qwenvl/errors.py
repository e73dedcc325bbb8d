"""Errors in the input, which a user can correct; any other exception is a bug.

This module imports nothing, so that a command line can use these errors before anything heavy is loaded.
"""


class InputError(ValueError):
    """A value or a file is wrong or cannot be used. The message says where, why and what to do."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that was named does not exist."""
