"""Rows of the datasets library: Parquet files, folders written by `save_to_disk`, datasets of the hub.

The rows are in memory-mapped Arrow files, which loader workers share. Images are read as they are stored, never
decoded; a scan for text does not read their bytes from disk.
"""

import copy
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from finetune.data.sample import DataError, Origin
from finetune.data.sources.rows import Rows

if TYPE_CHECKING:
    import datasets

BLOCK = 256
"""Rows that `scan` takes from the files at once."""
ORIGIN = {"file": pa.string(), "row": pa.int64()}
"""Fields of the column `origin`: where each row was before `finetune prepare` copied it."""
_ENDS = 1 << 20  # bytes


class ArrowRows(Rows):
    """The rows of one split of a `datasets.Dataset`; the origin of a row that has the column `origin` is that one.

    Args:
        dataset: a split.
        name: the source, as the recipe names it.
        folder: see `Rows`.
        digest: of the files; empty takes the dataset's own fingerprint.
    """

    def __init__(self, dataset: "datasets.Dataset", name: str, folder: Path, digest: str = ""):
        self.name, self.folder = name, folder
        self._dataset = dataset.with_format("arrow")
        self._features = _undecoded(dataset.features)
        self._digest = digest or dataset._fingerprint
        # With an indices mapping the n-th row is not the n-th of the table.
        self._has_origins = dataset._indices is None and is_origin(dataset.data.schema)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return next(self._rows(self._dataset[index : index + 1]))

    def origin(self, index: int) -> Origin:
        if self._has_origins:
            origin = self._dataset.data.column("origin")[index].as_py()
            if origin and origin["file"] is not None and origin["row"] is not None:
                return Origin(origin["file"], origin["row"])
        return super().origin(index)

    def scan(self, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        for first in range(start, stop, BLOCK):
            table = self._dataset[first : min(first + BLOCK, stop)]
            columns = [pa.chunked_array([_without_bytes(c) for c in column.chunks]) for column in table.columns]
            yield from self._rows(pa.table(columns, names=table.column_names))

    def fingerprint(self) -> str:
        return sha256(f"{self._digest} {len(self)}".encode()).hexdigest()

    def _rows(self, table: pa.Table) -> Iterator[Mapping[str, Any]]:
        try:
            rows = table.to_pylist()
        except (UnicodeDecodeError, pa.ArrowException) as error:  # damage that its file does not know of
            raise DataError(
                f"{self.name}: is damaged ({str(error)[:200]}); make or fetch the file again, and remove its "
                "copy in the datasets cache"
            ) from error
        return map(self._features.decode_example, rows)


def is_origin(schema: pa.Schema) -> bool:
    """Whether the rows say where they came from."""
    if "origin" not in schema.names or not pa.types.is_struct(kind := schema.field("origin").type):
        return False
    return {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} == ORIGIN


def files_digest(files: list[Path]) -> str:
    """Digest of large binary files by their sizes and their first and last mebibyte.

    The footers of Parquet and Arrow files say where everything is; reading all of it would take as long as an epoch.
    """
    digest = sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_ENDS))
            opened.seek(max(size - _ENDS, 0))
            digest.update(opened.read())
    return digest.hexdigest()


def _undecoded(features: "datasets.Features") -> "datasets.Features":
    """The features with decoding switched off for images and other media, at any depth."""
    import datasets

    def leave(feature: Any) -> Any:
        # Only media have this switch, and JSON, whose values are decoded.
        if hasattr(feature, "decode") and not isinstance(feature, datasets.Json):
            feature = copy.copy(feature)
            feature.decode = False
            return feature
        if isinstance(feature, dict):
            return {name: leave(inner) for name, inner in feature.items()}
        if isinstance(feature, datasets.List | datasets.LargeList):
            feature = copy.copy(feature)
            feature.feature = leave(feature.feature)
        return feature

    return datasets.Features({name: leave(feature) for name, feature in features.items()})


def _without_bytes(column: pa.Array) -> pa.Array:
    """The column with the bytes of its images, wherever they are in it, replaced by their number in decimal digits.

    Only how many bytes there are is read: the bytes themselves stay on disk.
    """
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pc.cast(pc.cast(pc.binary_length(column), pa.string()), pa.binary())
    if pa.types.is_struct(kind):
        # `flatten` and not `field`: only it knows that the fields of a missing struct are missing too.
        inner = [_without_bytes(part) for part in column.flatten()]
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return pa.StructArray.from_arrays(inner, names=names, mask=pc.is_null(column)) if inner else column
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        # `flatten` gives the values of this slice only, so the offsets are recomputed.
        lengths = pc.fill_null(pc.list_value_length(column), 0)
        offsets = pa.array(
            [0, *pc.cumulative_sum(lengths).to_pylist()], pa.int64() if pa.types.is_large_list(kind) else pa.int32()
        )
        build = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
        return build.from_arrays(offsets, _without_bytes(column.flatten()), mask=pc.is_null(column))
    return column
