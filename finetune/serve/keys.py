"""The keys of a server: who has one may ask."""

import re
from pathlib import Path

from finetune.errors import UserError

SHORTEST = 16
KEY = re.compile(r"[!-~]+")


def read_keys(file: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; empty lines do not count.

    Raises:
        UserError: it cannot be read, has none, or one that is too short or could not be sent.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"--api-key-file {file} cannot be read: {reason}") from None
    keys = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    if not keys:
        raise UserError(f"--api-key-file {file} has no key: write one into it, a line each")
    for number, key in keys.items():
        # The key itself is in no message.
        if not KEY.fullmatch(key):
            raise UserError(f"--api-key-file {file}, line {number}: a key has letters, digits and signs only")
        if len(key) < SHORTEST:
            raise UserError(
                f"--api-key-file {file}, line {number}: a key of {len(key)} characters can be guessed; give at least "
                f"{SHORTEST}, such as those of `openssl rand -hex 24`"
            )
    return tuple(keys.values())


def others_can_read(file: Path) -> bool:
    """Whether other users of this machine may read a file."""
    return bool(file.stat().st_mode & 0o077)
