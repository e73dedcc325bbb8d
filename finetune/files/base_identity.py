"""The identity of a checkpoint, found with a progress bar: all of its weights are read."""

from pathlib import Path

from finetune.files.byte_progress import byte_progress
from qwenvl.base_check import identify_base
from qwenvl.checkpoint.fingerprint import stored_bytes, weights_fingerprint
from qwenvl.checkpoint.identity import BaseIdentity


def identify(path: str | Path, *, page_cache: bool = False) -> BaseIdentity:
    """The identity of a checkpoint (folder or hub id), of what its files hold now.

    Args:
        page_cache: as `weights_fingerprint`; for a checkpoint that is loaded next.

    Raises:
        MissingFileError: no checkpoint at `path`.
        InputError: a file of it is damaged.
    """
    with byte_progress("hashing the weights", stored_bytes(path)) as progress:
        return identify_base(path, progress, page_cache=page_cache)


def hash_weights(path: str | Path) -> str:
    """`weights_fingerprint` of a folder, which may have no configuration yet."""
    with byte_progress("hashing the weights", stored_bytes(path)) as progress:
        return weights_fingerprint(path, progress)
