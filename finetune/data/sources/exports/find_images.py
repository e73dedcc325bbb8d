"""The images that an export names, in the folder of images: by their paths, else by their names where that is clear.

Exports name images by where they were on another machine: `C:\\scans\\1.png`, `/data/upload/3/1a2b3c4d-1.png`,
`https://host/a.png`. The file of that name below the folder is meant if there is one; of several, the one whose
folders agree with the path longer than those of the others, or the only one of these that lies with the export.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from finetune.data.sample import BadField

_UPLOAD = re.compile(r"^[0-9a-f]{8}-(?=.)")
"""What Label Studio puts before the names of uploaded files."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.IGNORECASE)
_SHOWN = 3


class ImageFinder:
    """Finds images below a folder.

    Args:
        root: absolute folder of the images.
        export: absolute folder of the export.

    Attributes:
        by_name: how many were found by their names alone.
        example: one of them, (as named, where it was found); None where there is none.
    """

    def __init__(self, root: Path, export: Path):
        self.root = root
        # "." where it is the root itself, None where it is elsewhere.
        self._export = export.relative_to(root).as_posix() if export.is_relative_to(root) else None
        self.by_name = 0
        self.example: tuple[str, str] | None = None
        self._files: dict[str, list[str]] | None = None

    def find(self, named: str, folder: str | None = None) -> str:
        """The path from the root; `named` itself where there is no such file, which is reported with the row.

        Args:
            named: as the export names it.
            folder: that it starts at, from the export's folder; None tries the root, and then the export's folder.

        Raises:
            BadField: several files have the name, and none is clearly meant.
        """
        if named.lower().startswith("data:"):
            return named
        if not _URL.match(named) and not named.startswith("/"):
            for start in self._starts(folder):
                here = os.path.normpath(f"{start}/{named}")
                if here != ".." and not here.startswith("../") and self._is_file(here):
                    return here
        parts = _parts(named)
        if not parts:
            return named
        found = self._candidates(parts)
        if not found:
            return named
        if len(found) > 1:
            listed = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
            raise BadField("image", f"{named[:200]!r} may be any of {len(found)} files of that name: {listed}")
        self.by_name += 1
        self.example = self.example or (named, found[0])
        return found[0]

    def _starts(self, folder: str | None) -> list[str]:
        """Where a relative name may start, from the root."""
        beside = [] if self._export is None else [f"{self._export}/{folder or ''}"]
        return beside or ["."] if folder is not None else [".", *beside]

    def _is_file(self, path: str) -> bool:
        try:
            return (self.root / path).is_file()
        except (OSError, ValueError):
            return False

    def _candidates(self, parts: Sequence[str]) -> list[str]:
        """The files that may be meant; one where it is clear."""
        if self._files is None:
            self._files = _files_by_name(self.root)
        found = self._files.get(parts[-1], [])
        if not found and (plain := _UPLOAD.sub("", parts[-1])) != parts[-1]:
            found = self._files.get(plain, [])
        agreeing = [_agreeing(parts[:-1], path.split("/")[:-1]) for path in found]
        most = max(agreeing, default=0)
        best = [path for path, same in zip(found, agreeing, strict=True) if same == most]
        beside = [path for path in best if self._export is not None and path.startswith(f"{self._export}/")]
        return beside if len(beside) == 1 else best


def _parts(named: str) -> list[str]:
    """The folders and the name of a path of any system, or of a URL."""
    if _URL.match(named):
        try:
            named = unquote(urlsplit(named).path)
        except ValueError:
            return []
    return [part for part in named.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def _agreeing(named: Sequence[str], found: Sequence[str]) -> int:
    """How many folders right above a file are the same."""
    count = 0
    for one, other in zip(reversed(named), reversed(found), strict=False):
        if one != other:
            break
        count += 1
    return count


def _files_by_name(root: Path) -> dict[str, list[str]]:
    """Name -> paths of the files of that name, from the root; links to folders are not followed."""
    found: dict[str, list[str]] = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        for file in sorted(files):
            found.setdefault(file, []).append(file if inside == "." else f"{inside}/{file}")
    return found
