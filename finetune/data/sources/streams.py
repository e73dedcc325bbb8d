"""Hub datasets row by row: fetched into a folder of the datasets cache once, then read like other Arrow rows.

For the first thousands of rows of a dataset that would fill the disk. Exactly `limit` rows are kept (the hub sends
whole row groups of a Parquet file), so that lengths are known and the data is checked before training, as always. The
rows are written in parts of bounded size, each whole or not there: a fetch that was interrupted continues where it
stopped. Rows that were fetched are not fetched again, and need no network.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from filelock import FileLock

from finetune.data.row_progress import RowProgress
from finetune.data.sample import DataError
from finetune.data.sources.arrow_rows import ArrowRows
from finetune.data.sources.rows import Rows
from finetune.errors import Failed, UserError
from finetune.files.atomic_writes import clean_partials, write_text, writing_file
from finetune.files.path_errors import path_errors

if TYPE_CHECKING:
    import datasets

BLOCK_ROWS = 100
"""Rows fetched at once."""
PART_ROWS, PART_BYTES = 10_000, 128 << 20
"""A part is written when it has this many rows or bytes."""
STATE_FILE = "stream.json"


@dataclass
class Fetched:
    """What has been fetched of a dataset, as `stream.json` has it.

    Attributes:
        dataset, config, split: what is streamed.
        revision: the dataset's commit on the hub.
        parts: file name and rows of each part, in order.
        position: of the stream after the last part; the datasets library's `state_dict`.
        complete: whether that is the end of the dataset.
    """

    dataset: str
    config: str | None
    split: str
    revision: str
    parts: list[tuple[str, int]] = field(default_factory=list)
    position: dict[str, Any] | None = None
    complete: bool = False

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.parts)

    def has(self, limit: int | None) -> bool:
        return self.complete or (limit is not None and self.rows >= limit)


def read_stream(dataset_id: str, config: str | None, split: str | None, limit: int | None) -> Rows:
    """The first `limit` rows of a hub dataset (None: all); those that are missing here are fetched.

    Where several processes ask for the same dataset, one fetches and the others wait.

    Raises:
        DataError: the dataset cannot be loaded, was changed since the fetch began, or its rows have different types.
        PathError: the rows cannot be written to the datasets cache.
        Failed: the connection broke; what was fetched until then stays.
    """
    folder = stream_folder(dataset_id, config, split or "train")
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            fetched = _read_state(folder)
            if fetched is None or not fetched.has(limit):
                clean_partials(folder)
                fetched = _fetch(folder, fetched, dataset_id, config, split or "train", limit)
    return _rows(folder, fetched, limit)


def _cache_errors(folder: Path) -> AbstractContextManager[None]:
    """Turn an OSError about the folder in the datasets cache into an error for the user."""
    return path_errors(folder, "keep the streamed rows in", "Make room there, or set HF_HOME to a folder elsewhere")


def stream_folder(dataset_id: str, config: str | None, split: str) -> Path:
    """Where the rows of a dataset are kept."""
    import datasets

    readable = re.sub(r"[^\w.-]+", "--", f"{dataset_id}--{config or 'default'}--{split}")
    key = sha256(json.dumps([dataset_id, config, split]).encode()).hexdigest()[:12]
    return Path(datasets.config.HF_DATASETS_CACHE) / "streamed" / f"{readable[:100]}-{key}"


def _fetch(
    folder: Path, fetched: Fetched | None, dataset_id: str, config: str | None, split: str, limit: int | None
) -> Fetched:
    import datasets

    name = f"{dataset_id} [{split}]"
    try:
        builder = datasets.load_dataset_builder(dataset_id, config)
        stream = builder.as_streaming_dataset(split=split)
    except Exception as error:  # no network, no such dataset, no right to it, an unknown config or split, ...
        raise DataError(
            f"{name}: cannot be streamed from the hub ({type(error).__name__}: {error}); streaming has whole splits "
            "by their names: take a part of one with limit"
        ) from error
    if fetched is None:
        fetched = Fetched(dataset_id, config, split, str(builder.hash))
    elif fetched.revision != str(builder.hash):
        raise DataError(
            f"{name}: was changed on the hub since its first {fetched.rows:,} rows were fetched; delete {folder} to "
            "fetch it again, or set limit to no more than these rows"
        )
    if stream.features is not None:
        stream = stream.decode(False)
    if fetched.position is not None:
        stream.load_state_dict(fetched.position)

    wanted = None if limit is None else limit - fetched.rows
    spool = _Spool(folder, fetched, name)
    # The position is asked for after the last row of a block and before the next one: it is where the next one is.
    rows = iter(stream)
    with RowProgress(f"fetching {name}", limit, fetched.rows) as progress:
        try:
            while block := list(islice(rows, BLOCK_ROWS if wanted is None else min(BLOCK_ROWS, wanted))):
                spool.add(block, stream.state_dict())
                progress.add(len(block))
                wanted = None if wanted is None else wanted - len(block)
        except (UserError, Failed):
            raise
        except Exception as error:  # whatever a connection or a damaged file raises, in several libraries
            spool.flush()
            raise Failed(
                f"{name}: the stream broke after {fetched.rows:,} rows ({type(error).__name__}: {error}). They are "
                f"kept in {folder}: the same command continues from there"
            ) from error
    spool.flush(complete=wanted is None or wanted > 0)
    if not fetched.rows:
        raise DataError(f"{name}: holds no rows")
    return fetched


class _Spool:
    """Collects blocks of rows, and writes them as parts."""

    def __init__(self, folder: Path, fetched: Fetched, name: str):
        self.folder, self.fetched, self.name = folder, fetched, name
        self._blocks: list[tuple[pa.Table, dict[str, Any]]] = []
        self._features = _features(folder / fetched.parts[0][0]) if fetched.parts else None

    def add(self, rows: list[Mapping[str, Any]], position: dict[str, Any]) -> None:
        """Take rows, and the position of the stream after them.

        Raises:
            DataError: a row does not fit the ones before.
        """
        self._blocks.append((self._table(rows), position))
        tables = [table for table, _ in self._blocks]
        if sum(map(len, tables)) >= PART_ROWS or sum(table.nbytes for table in tables) >= PART_BYTES:
            self.flush()

    def flush(self, complete: bool = False) -> None:
        """Write the rows that were taken as a part, and then the state.

        Raises:
            PathError: the datasets cache cannot be written.
        """
        with _cache_errors(self.folder):
            if self._blocks:
                name = f"part-{len(self.fetched.parts):05}.arrow"
                _write_arrow(self.folder / name, [table for table, _ in self._blocks])
                self.fetched.parts.append((name, sum(len(table) for table, _ in self._blocks)))
                self.fetched.position = self._blocks[-1][1]
                self._blocks = []
            self.fetched.complete = complete
            write_text(self.folder / STATE_FILE, json.dumps(asdict(self.fetched), indent=1) + "\n")

    def _table(self, rows: list[Mapping[str, Any]]) -> pa.Table:
        import datasets

        names = self._features or dict.fromkeys(name for row in rows for name in row)
        start = self.fetched.rows + sum(len(table) for table, _ in self._blocks)
        for number, row in enumerate(rows, start=start + 1):
            if unknown := [name for name, value in row.items() if value is not None and name not in names]:
                raise DataError(f"{self.name}: row {number:,} has {', '.join(unknown)}, which the first rows have not")
        try:
            columns = {name: [row.get(name) for row in rows] for name in names}
            block = datasets.Dataset.from_dict(columns, features=self._features)
            # With the bytes of images that the dataset keeps as files of the hub.
            table = datasets.table.embed_table_storage(block.data.table)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(
                f"{self.name}: rows {start + 1:,} to {start + len(rows):,} do not fit the first ones ({error})"
            ) from error
        self._features = block.features
        return table


def _rows(folder: Path, fetched: Fetched, limit: int | None) -> Rows:
    import datasets

    parts = [datasets.Dataset.from_file(str(folder / name)) for name, _ in fetched.parts]
    dataset = datasets.concatenate_datasets(parts)
    if limit is not None and limit < len(dataset):
        dataset = dataset.select(range(limit))
    # Of what the rows are, not of their files: the same whether they were fetched at once or in parts.
    made_of = [fetched.dataset, fetched.config, fetched.split, fetched.revision]
    digest = sha256(json.dumps(made_of).encode()).hexdigest()
    return ArrowRows(dataset, f"{fetched.dataset} [{fetched.split}]", folder, digest)


def _read_state(folder: Path) -> Fetched | None:
    """What was fetched before; None where nothing was.

    Raises:
        DataError: the state or a part of the rows is damaged.
    """
    try:
        fetched = Fetched(**json.loads((folder / STATE_FILE).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{folder / STATE_FILE} is damaged ({error}): delete {folder} to fetch the rows again"
        ) from error
    for name, rows in fetched.parts:
        try:
            found = sum(batch.num_rows for batch in _batches(folder / name))
        except (OSError, pa.ArrowException):
            found = -1
        if found != rows:
            raise DataError(f"{folder / name} is missing or damaged: delete {folder} to fetch the rows again")
    return fetched


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    # Memory-mapped, so that only the headers of the batches are read.
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader


def _features(file: Path) -> "datasets.Features":
    import datasets

    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        return datasets.Features.from_arrow_schema(reader.schema)


def _write_arrow(file: Path, tables: Sequence[pa.Table]) -> None:
    """The tables as one Arrow stream file."""
    with writing_file(file) as partial, pa.ipc.new_stream(str(partial), tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
