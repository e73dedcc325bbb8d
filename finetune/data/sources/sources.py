"""Where rows are read from: files of several kinds, folders, and datasets of the Hugging Face hub."""

import codecs
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from finetune.data.sample import DataError
from finetune.data.sources.annotation_rows import AnnotationRows
from finetune.data.sources.csv_rows import DELIMITERS, CsvRows
from finetune.data.sources.image_folder import METADATA, ImageFolderRows, find_metadata
from finetune.data.sources.local_files import data_errors
from finetune.data.sources.rows import JsonLinesRows, JsonRows, Rows
from finetune.errors import Interrupted, MissingFileError
from finetune.recipe.document_fields import Prompts
from finetune.recipe.sections import Annotations

if TYPE_CHECKING:
    import datasets


class Location(Protocol):
    """Where the rows of a source are.

    Attributes:
        path: a .json, .jsonl, .csv, .tsv or .parquet file; a folder written by `save_to_disk`, of Parquet files, or of
            images with a metadata file; or the id of a hub dataset. What exists here is never looked for on the hub.
        config, split: of a hub dataset; the split also of a folder that has several. None is the only one, or "train".
        limit: rows to read, from the beginning; None is all.
        streaming: fetch a hub dataset's rows one after the other, and none beyond `limit` (see `streams`).
    """

    @property
    def path(self) -> str: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def streaming(self) -> bool: ...


class FieldsSource(Protocol):
    """A source of format `fields`: what it asks of each document, see `formats.document_fields`."""

    @property
    def fields(self) -> Sequence[str]: ...
    @property
    def reply(self) -> Literal["value", "json"]: ...
    @property
    def missing(self) -> Literal["write_null", "leave_out"] | None: ...
    @property
    def nested(self) -> Sequence[str]: ...
    @property
    def prompts(self) -> Prompts | None: ...


class RowSource(Location, FieldsSource, Protocol):
    """A source of samples: where its rows are, and how they are read. A recipe's `Source` is one.

    Attributes:
        format, columns, prompt, box_form: see `formats.RowFormat`.
        weight: how often each sample is seen in an epoch; 0.5 is a half of them, drawn by the seed.
    """

    @property
    def format(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def prompt(self) -> str | None: ...
    @property
    def box_form(self) -> Literal["xyxy", "xywh"] | None: ...
    @property
    def weight(self) -> float: ...


_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILE_KINDS = (".json", ".jsonl", ".ndjson", ".parquet", *DELIMITERS)
_LONGEST_LINE = 1 << 26  # bytes


def open_rows(source: Location, row_format: str, images_root: str | Path | None) -> Rows:
    """Open a source for a format: its rows by number, those of an annotation export too.

    Args:
        source: where its rows are.
        row_format: that they are read by.
        images_root: folder of the images, where an export names images that are to be found; None is the source's own.

    Raises:
        MissingFileError, DataError, Failed: as `read_source`.
    """
    # Sources of other programs, made before there were exports, have no such attribute.
    annotations: Annotations | None = getattr(source, "annotations", None)
    if annotations is None:
        return read_source(source)
    root = None if images_root is None else Path(images_root)
    return AnnotationRows(Path(source.path), row_format, source.split, annotations, root)


def read_source(source: Location) -> Rows:
    """Open a source: its rows by number, none of them kept in memory.

    Raises:
        MissingFileError: a file that does not exist.
        DataError: a file or folder that cannot be read, is damaged or of a kind that is not read, or a hub dataset
            that cannot be loaded.
        Failed: the connection broke while rows were streamed.
    """
    name, path = str(source.path), Path(source.path)
    with data_errors(path):
        rows = _read_here(source, name, path)
    if rows is not None:
        return rows
    if path.is_symlink():
        raise MissingFileError(f"data: {name} is a symbolic link to {path.readlink()}, which does not exist")
    if path.suffix in _FILE_KINDS or path.is_absolute() or not _HUB_ID.fullmatch(name):
        raise MissingFileError(f"data: there is no file {name} (relative paths start at {Path.cwd()})")
    if source.streaming:
        from finetune.data.sources.streams import read_stream

        return read_stream(name, source.config, source.split, source.limit)
    return _read_hub(name, source.config, source.split)


def _read_here(source: Location, name: str, path: Path) -> Rows | None:
    """The rows of a file or folder of this machine; None where there is none at `path`."""
    if source.streaming and path.exists():
        raise DataError(f"{name}: streaming fetches rows from the hub, and this is here already; remove streaming")
    if path.is_file():
        return _read_file(path, name)
    if path.is_dir():
        return _read_folder(path, name, source.split)
    if path.exists():
        raise DataError(f"{name}: is a device, pipe or socket; give a file or a folder")
    return None


def _read_file(path: Path, name: str) -> Rows:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return JsonLinesRows(path, name)
        case ".json":
            return JsonLinesRows(path, name) if _is_json_lines(path) else JsonRows(path, name)
        case ".parquet":
            return _read_parquet([path], name, path.parent)
        case ".csv" | ".tsv":
            return CsvRows(path, name, DELIMITERS[path.suffix.lower()])
    raise DataError(
        f"{name}: files of kind {path.suffix or '(none)'} are not read; give one of {', '.join(_FILE_KINDS)}"
    )


def _is_json_lines(path: Path) -> bool:
    """Whether a .json file's first line is a whole row: such data goes by both names."""
    with path.open("rb") as file:
        if not file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return False
        file.seek(0)
        line = file.readline(_LONGEST_LINE)
        is_all = not file.readline(_LONGEST_LINE)
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    # All rows as one object ({"data": [...]}) can be one line as well.
    return not (is_all and any(_are_rows(value) for value in row.values()))


def _are_rows(value: Any) -> bool:
    """Whether a value is a list of rows, and not of a conversation's turns."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and not {"role", "from", "type"} & item.keys() for item in value)
    )


def _read_folder(folder: Path, name: str, split: str | None) -> Rows:
    from finetune.data.sources.arrow_rows import ArrowRows, files_digest

    with os.scandir(folder):  # raises where the folder may not be read; a glob would find nothing
        pass
    is_several = (folder / "dataset_dict.json").is_file()
    if is_several or (folder / "state.json").is_file():
        import datasets

        try:
            dataset = datasets.load_from_disk(str(folder))
        except Interrupted:
            raise
        except Exception as error:  # whatever a damaged folder raises, in several libraries
            raise DataError(f"{name}: cannot be loaded ({type(error).__name__}: {error})") from error
        if is_several:
            dataset = _choose(dataset, name, split)
        files = sorted({Path(entry["filename"]) for entry in dataset.cache_files})
        return ArrowRows(dataset, name, folder.absolute(), files_digest(files))
    if (metadata := find_metadata(folder, name)) is not None:
        with data_errors(metadata):
            return ImageFolderRows(_read_file(metadata, f"{name}/{metadata.name}"))
    if files := sorted(folder.glob("*.parquet")):
        return _read_parquet(files, name, folder)
    inner = sorted({str(file.parent) for file in folder.glob("*/*.parquet")})
    remedy = f"; give one of its folders that hold Parquet files: {', '.join(inner[:5])}" if inner else ""
    raise DataError(
        f"{name}: the folder holds neither a dataset written by save_to_disk, nor Parquet files, nor "
        f"{' or '.join(METADATA)}{remedy}"
    )


def _read_parquet(files: list[Path], name: str, folder: Path) -> Rows:
    import datasets

    from finetune.data.sources.arrow_rows import ArrowRows, files_digest

    try:
        # Converted to Arrow in the datasets library's cache: Parquet cannot be read by row.
        dataset = datasets.Dataset.from_parquet([str(file) for file in files])
    except Interrupted:
        raise
    except Exception as error:  # whatever a damaged file raises, in several libraries
        raise DataError(f"{name}: cannot be read as Parquet ({type(error).__name__}: {error})") from error
    return ArrowRows(dataset, name, folder.absolute(), files_digest(files))


def _read_hub(dataset_id: str, config: str | None, split: str | None) -> Rows:
    import datasets
    from huggingface_hub.constants import HF_HOME

    from finetune.data.sources.arrow_rows import ArrowRows

    try:
        dataset = datasets.load_dataset(dataset_id, config, split=split or "train")
    except Interrupted:
        raise
    except Exception as error:  # no network, no such dataset, no right to it, an unknown config or split, ...
        raise DataError(
            f"{dataset_id}: there is no such file or folder here, and as a hub dataset it cannot be loaded "
            f"({type(error).__name__}: {error})"
        ) from error
    # Images that a hub dataset keeps as files are in the caches below this folder.
    return ArrowRows(dataset, f"{dataset_id} [{split or 'train'}]", Path(HF_HOME))


def _choose(splits: "datasets.DatasetDict", name: str, split: str | None) -> "datasets.Dataset":
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if (split or "train") not in splits:
        raise DataError(f"{name}: has no split {split or 'train'!r} but {', '.join(splits)}")
    return splits[split or "train"]
