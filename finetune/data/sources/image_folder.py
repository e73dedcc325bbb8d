"""A folder of images with a metadata file, in the layout of the datasets library.

`file_name` (or `file_names`), a path within the folder, stands for the column `image` (`images`), and `X_file_name`
for `X`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.data.sample import BadRow, DataError, Origin
from finetune.data.sources.rows import Rows

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def find_metadata(folder: Path, name: str) -> Path | None:
    """The folder's metadata file; None where it has none.

    Raises:
        DataError: it has several.
    """
    found = [folder / metadata for metadata in METADATA if (folder / metadata).is_file()]
    if len(found) > 1:
        raise DataError(f"{name}: holds {' and '.join(file.name for file in found)}; keep one of them")
    return found[0] if found else None


class ImageFolderRows(Rows):
    """The rows of the metadata file.

    Args:
        metadata: its rows.
    """

    def __init__(self, metadata: Rows):
        self.name, self.folder = metadata.name, metadata.folder
        self._metadata = metadata

    def __len__(self) -> int:
        return len(self._metadata)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return _with_image_columns(self._metadata[index])

    def scan(self, start: int, stop: int) -> Iterator[Mapping[str, Any] | BadRow]:
        for row in self._metadata.scan(start, stop):
            yield row if isinstance(row, BadRow) else _with_image_columns(row)

    def origin(self, index: int) -> Origin:
        return self._metadata.origin(index)

    def fingerprint(self) -> str:
        return self._metadata.fingerprint()


def _with_image_columns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    named = dict(row)
    for given, value in row.items():
        for ending, column in (("file_name", "image"), ("file_names", "images")):
            if given == ending or given.endswith(f"_{ending}"):
                del named[given]
                named.setdefault(given.removesuffix(f"_{ending}") if given != ending else column, value)
    return named
