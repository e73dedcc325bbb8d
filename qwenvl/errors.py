"""What is raised for input that a user can put right; any other exception is a fault of ours.

This module imports nothing, so that a command line can know these errors before anything heavy is loaded.
"""


class InputError(ValueError):
    """A value, a file or its surroundings are not as they must be. The message says where, why and what to do."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that was named does not exist."""
