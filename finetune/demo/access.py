"""Who may open the page that other machines reach: whoever has a password."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from finetune.errors import UserError
from finetune.files.path_errors import path_errors

WRONG_PASSWORD_SECONDS = 1.0
"""How long the answer to a wrong password takes: nobody tries many."""

CheckPassword = Callable[[str, str], Awaitable[bool]]


def read_passwords(file: Path) -> dict[str, str]:
    """The passwords by name, from lines `name:password`; blank lines are skipped.

    Raises:
        UserError: it cannot be read, a line is something else, or there is none.
    """
    with path_errors(file, "read", "Give another file with --password-file"):
        data = file.read_bytes()
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--password-file {file}: it is no text in UTF-8") from None
    passwords: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, colon, password = line.partition(":")
        name = name.strip()
        if not (colon and name and password):
            raise UserError(f"--password-file {file}, line {number}: write name:password")
        if name in passwords:
            raise UserError(f"--password-file {file}, line {number}: the name is there twice")
        passwords[name] = password
    if not passwords:
        raise UserError(f"--password-file {file}: it is empty: write a line name:password")
    return passwords


def password_check(passwords: Mapping[str, str]) -> CheckPassword:
    """A check of name and password for Gradio, in constant time."""

    async def check(name: str, password: str) -> bool:
        # All are compared, so that the time does not tell whether there is such a name.
        right = [
            hmac.compare_digest(name.encode(), known.encode()) & hmac.compare_digest(password.encode(), own.encode())
            for known, own in passwords.items()
        ]
        if any(right):
            return True
        await asyncio.sleep(WRONG_PASSWORD_SECONDS)
        return False

    return check
