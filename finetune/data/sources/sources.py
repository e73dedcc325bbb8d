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
from finetune.data.sources.several_files import WILDCARDS, SeveralFilesRows, files_of, folder_of
from finetune.data.sources.text_encoding import PACKED, kind_of_file, text_file
from finetune.errors import MissingFileError
from finetune.recipe.document_fields import Prompts
from finetune.recipe.sources import Annotations

if TYPE_CHECKING:
    import datasets


class Location(Protocol):
    """Where the rows of a source are.

    Attributes:
        path: a .json, .jsonl, .csv, .tsv, .txt, .xlsx, .parquet or .tar file; a pattern (`data/*.jsonl`) that names
            several; a folder written by `save_to_disk`, of Parquet files, or of images with a metadata file; or the id
            of a hub dataset. What exists here is never looked for on the hub.
        config, split: of a hub dataset; the split also of a folder that has several, and the sheet of a workbook. None
            is the only one, or "train".
        limit: rows to read, from the beginning; None is all.
        streaming: fetch a hub dataset's rows one after the other, and none beyond `limit` (see `streams`).
        encoding: of a text file; None is UTF-8 or what the file's own marks say (see `text_encoding`).
        delimiter: between the fields of a .csv, .tsv or .txt file; None is what the file shows.
        annotations: how an annotation export is read; None for a file, folder or dataset of rows.
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
    @property
    def encoding(self) -> str | None: ...
    @property
    def delimiter(self) -> str | None: ...
    @property
    def annotations(self) -> Annotations | None: ...


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
TEXT_KINDS = (".json", ".jsonl", ".ndjson", *DELIMITERS)
_FILE_KINDS = (*TEXT_KINDS, ".xlsx", ".parquet", ".tar")
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
    annotations = source.annotations
    if annotations is None:
        return read_source(source)
    _refuse_keys(source, str(source.path), "encoding", "delimiter")
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
    if any(mark in name for mark in WILDCARDS):
        return _read_pattern(source, name)
    if path.is_symlink():
        raise MissingFileError(f"data: {name} is a symbolic link to {path.readlink()}, which does not exist")
    if kind_of_file(path) in _FILE_KINDS or path.is_absolute() or not _HUB_ID.fullmatch(name):
        raise MissingFileError(f"data: there is no file {name} (relative paths start at {Path.cwd()})")
    _refuse_keys(source, name, "encoding", "delimiter")
    if source.streaming:
        from finetune.data.sources.streams import read_stream

        return read_stream(name, source.config, source.split, source.limit)
    return _read_hub(name, source.config, source.split)


def _read_here(source: Location, name: str, path: Path) -> Rows | None:
    """The rows of a file or folder of this machine; None where there is none at `path`."""
    if source.streaming and path.exists():
        raise DataError(f"{name}: streaming fetches rows from the hub, and this is here already; remove streaming")
    if path.is_file():
        return _read_file(source, path, name)
    if path.is_dir():
        return _read_folder(source, path, name)
    if path.exists():
        raise DataError(f"{name}: is a device, pipe or socket; give a file or a folder")
    return None


def _read_pattern(source: Location, pattern: str) -> Rows:
    with data_errors(folder_of(pattern)):
        files = files_of(pattern)
    if not files:
        raise MissingFileError(f"data: no file is named like {pattern} (relative paths start at {Path.cwd()})")
    if source.streaming:
        raise DataError(f"{pattern}: streaming fetches rows from the hub, and this is here already; remove streaming")
    kinds = {kind_of_file(file) for file in files}
    if kinds <= {".parquet"} or kinds <= {".tar"}:
        _refuse_keys(source, pattern, "encoding", "delimiter")
        return (_read_parquet if ".parquet" in kinds else _read_tars)(files, pattern, folder_of(pattern))
    parts = []
    for file in files:
        with data_errors(file):
            parts.append(_read_file(source, file, str(file)))
    return SeveralFilesRows(parts, pattern, folder_of(pattern))


def _read_tars(files: list[Path], name: str, folder: Path) -> Rows:
    from finetune.data.sources.tar_rows import read_tars

    return read_tars(files, name, folder)


def _read_file(source: Location, path: Path, name: str) -> Rows:
    kind = kind_of_file(path)
    if kind in TEXT_KINDS:
        text = text_file(path, name, source.encoding)
        if kind in DELIMITERS:
            return CsvRows(path, name, source.delimiter, text)
        _refuse_keys(source, name, "delimiter")
        is_lines = _is_json_lines(text) if kind == ".json" else not _is_json_list(text)
        return JsonLinesRows(path, name, text) if is_lines else JsonRows(path, name, text)
    _refuse_keys(source, name, "encoding", "delimiter")
    if path.suffix.lower() == ".parquet":
        return _read_parquet([path], name, path.parent)
    if kind == ".tar":
        return _read_tars([path], name, path.parent)
    if path.suffix.lower() == ".xlsx":
        from finetune.data.sources.workbook import read_workbook

        return read_workbook(path, name, source.split)
    raise DataError(
        f"{name}: files of kind {''.join(path.suffixes[-2:]) or '(none)'} are not read; give one of "
        f"{', '.join(_FILE_KINDS)}, text also packed as {PACKED}"
    )


def _refuse_keys(source: Location, name: str, *keys: Literal["encoding", "delimiter"]) -> None:
    """Raises:
    DataError: a key is given that says nothing about this source.
    """
    about = {"encoding": "is of text files", "delimiter": f"is of {', '.join(DELIMITERS)} files"}
    given = {"encoding": source.encoding, "delimiter": source.delimiter}
    for key in keys:
        if given[key] is not None:
            raise DataError(f"{name}: {key} {about[key]}; remove it")


def _is_json_list(path: Path) -> bool:
    """Whether a .jsonl file holds a list, or objects over several lines each: such data goes by both names."""
    with path.open("rb") as file:
        lines = (
            line.removeprefix(codecs.BOM_UTF8).strip() for line in iter(lambda: file.readline(_LONGEST_LINE), b"")
        )
        first = next((line for line in lines if line), b"")
    return first.startswith(b"[") or first == b"{"


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


def _read_folder(source: Location, folder: Path, name: str) -> Rows:
    from finetune.data.sources.arrow_rows import ArrowRows, files_digest

    with os.scandir(folder):  # raises where the folder may not be read; a glob would find nothing
        pass
    is_several = (folder / "dataset_dict.json").is_file()
    if is_several or (folder / "state.json").is_file():
        _refuse_keys(source, name, "encoding", "delimiter")
        import datasets

        try:
            dataset = datasets.load_from_disk(str(folder))
        except Exception as error:  # whatever a damaged folder raises, in several libraries
            raise DataError(f"{name}: cannot be loaded ({type(error).__name__}: {error})") from error
        if is_several:
            dataset = _choose(dataset, name, source.split)
        files = sorted({Path(entry["filename"]) for entry in dataset.cache_files})
        return ArrowRows(dataset, name, folder.absolute(), files_digest(files))
    if (metadata := find_metadata(folder, name)) is not None:
        with data_errors(metadata):
            return ImageFolderRows(_read_file(source, metadata, f"{name}/{metadata.name}"))
    _refuse_keys(source, name, "encoding", "delimiter")
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
    except Exception as error:  # whatever a damaged file raises, in several libraries
        raise DataError(f"{name}: cannot be read as Parquet ({type(error).__name__}: {error})") from error
    return ArrowRows(dataset, name, folder.absolute(), files_digest(files))


def _read_hub(dataset_id: str, config: str | None, split: str | None) -> Rows:
    import datasets
    from huggingface_hub.constants import HF_HOME

    from finetune.data.sources.arrow_rows import ArrowRows

    try:
        dataset = datasets.load_dataset(dataset_id, config, split=split or "train")
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
