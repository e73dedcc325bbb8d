"""Rows of WebDataset tar files: the members with one name before the first dot are a row, their endings its columns.

The datasets library reads them. Here the keys of a member `.json` become columns, and the images `image`, or `images`
where a row has several.
"""

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.sample import BadRow, DataError, Origin
from finetune.data.sources.arrow_rows import ArrowRows, files_digest
from finetune.data.sources.rows import Rows

_OWN = ("__key__", "__url__")


class TarRows(Rows):
    """The rows of tar files.

    Args:
        rows: as the datasets library has them.
        images: the columns of images, in order.
    """

    def __init__(self, rows: ArrowRows, images: Sequence[str]):
        self.name, self.folder = rows.name, rows.folder
        self._rows, self._images = rows, images

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._with_columns(self._rows[index])

    def scan(self, start: int, stop: int) -> Iterator[Mapping[str, Any] | BadRow]:
        return map(self._with_columns, self._rows.scan(start, stop))

    def origin(self, index: int) -> Origin:
        return self._rows.origin(index)

    def fingerprint(self) -> str:
        return self._rows.fingerprint()

    def _with_columns(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        told = row.get("json")
        columns = {**told} if isinstance(told, Mapping) else {}
        kept = {name: value for name, value in row.items() if name not in (*_OWN, *self._images)}
        if isinstance(told, Mapping):
            del kept["json"]
        images = [row[name] for name in self._images if row[name] is not None]
        shown = {"image": images[0] if images else None} if len(self._images) == 1 else {"images": images}
        return {"id": row["__key__"], **columns, **kept, **(shown if self._images else {})}


def read_tars(files: Sequence[Path], name: str, folder: Path) -> Rows:
    """The rows of WebDataset tar files, which are converted to Arrow in the datasets library's cache.

    Raises:
        DataError: damaged or no such tar files, or rows with other members than the first ones.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(
            "webdataset", data_files={"train": [str(file.absolute()) for file in files]}, split="train"
        )
        for file in files:
            _refuse_other_members(file, set(dataset.column_names))
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file raises, in several libraries
        raise DataError(f"{name}: cannot be read as a WebDataset ({type(error).__name__}: {error})") from error
    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    return TarRows(ArrowRows(dataset, name, folder.absolute(), files_digest(list(files))), sorted(images))


def _refuse_other_members(file: Path, columns: set[str]) -> None:
    """Raises:
    DataError: a row has a member that the first rows have not: the datasets library would leave it out silently.
    """
    with tarfile.open(file) as members:
        for member in members:
            name = Path(member.name).name
            if name.startswith("._") or name == ".DS_Store":  # of macOS; no rows
                continue
            _, dot, ending = name.partition(".")
            if member.isfile() and dot and ending not in columns:
                raise DataError(
                    f"{file}: {member.name} has an ending that the first rows have not ("
                    f"{', '.join(sorted(columns - set(_OWN)))}); give all rows the same"
                )
