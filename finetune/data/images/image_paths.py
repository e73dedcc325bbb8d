"""Paths of images as other systems write them: which file is meant, where that is clear, and a hint where it is not.

A path that is there is never read as anything else. Otherwise `a%20b.png`, `scans\\1.png` and `file:///data/1.png` are
followed where exactly one file inside the root fits; a file elsewhere is never looked at.
"""

import os
import re
import unicodedata
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

from qwenvl.images.page_references import split_page

_FOREIGN = re.compile(r"[\\%]|file:", re.IGNORECASE)
_FILE_URL = re.compile("file:(//(?P<host>[^/]*))?(?P<path>/.*)", re.IGNORECASE | re.DOTALL)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def meant_path(path: str, root: Path) -> str:
    """The path, made absolute below `root`, that a reference to an image means.

    Only references that other systems write cost a look at the disk.
    """
    joined = os.path.join(root, path)  # noqa: PTH118 (Path would fold the slashes by which a URL is known)
    if not _FOREIGN.search(path) or os.path.lexists(joined):
        return joined
    found = {file for form in _forms(path) if (file := _inside(form, root)) is not None}
    if len(found) == 1:
        return found.pop()
    file, page = split_page(path)
    return joined if found or page is None else f"{meant_path(file, root)}#{page}"


def _forms(path: str) -> list[str]:
    """What a path may be written for, as paths of this system."""
    forms = [path]
    if path[:5].lower() == "file:":
        address = _FILE_URL.fullmatch(path)
        if address is None or (address["host"] or "localhost").lower() != "localhost":
            return []  # a file of another machine
        forms = [address["path"]]
    forms += [unquote(form, errors="strict") for form in forms if _is_quoted(form)]
    forms += [form.replace("\\", "/") for form in forms if "\\" in form and not _DRIVE.match(form)]
    return [form for form in forms if not form.startswith("//")]


def _is_quoted(path: str) -> bool:
    try:
        return "%" in path and "\0" not in unquote(path, errors="strict")
    except UnicodeDecodeError:
        return False


def _inside(path: str, root: Path) -> str | None:
    """The file, if there is one inside the root after links are followed."""
    joined = os.path.join(root, path)  # noqa: PTH118
    try:
        target = os.path.realpath(joined, strict=True)
    except (OSError, ValueError):
        return None
    is_inside = Path(target).is_relative_to(os.path.realpath(root))
    return joined if is_inside and Path(target).is_file() else None


def hint(path: str, root: str | Path) -> str:
    """What a path that leads nowhere was probably meant for, to be added to the error; empty where nothing is like it.

    Args:
        path: absolute, or as it was given.
        root: where images have to be; no other folder is looked into.
    """
    root = Path(root)
    given = path.removeprefix(f"{root}{os.sep}")
    forms = _forms(given) or [given]
    tails = PureWindowsPath(forms[-1]).parts  # takes both kinds of slashes
    tails = tails[1:] if tails and PureWindowsPath(forms[-1]).anchor else tails
    if not tails or ".." in tails:
        return ""
    for start in range(len(tails)):
        tail = Path(*tails[start:])
        found = str(tail) if _inside(str(tail), root) else _other_spelling(tail, root)
        if found is not None:
            return f"; is {found!r} meant? That is in {root}"
    return ""


def _other_spelling(tail: Path, root: Path) -> str | None:
    """The file of that name in other letters: lower or upper case, or accents composed otherwise."""
    folder = Path()
    for part in tail.parts:
        named = _names(str(root / folder)).get(_folded(part))
        if named is None:
            return None
        folder /= named
    return str(folder) if _inside(str(folder), root) else None


@lru_cache(maxsize=16)
def _names(folder: str) -> dict[str, str]:
    """The names in a folder, by what they are regardless of case and composition."""
    try:
        return {_folded(path.name): path.name for path in Path(folder).iterdir()}
    except OSError:
        return {}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
