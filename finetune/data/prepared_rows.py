"""Samples as rows of Parquet files in the `messages` format, with the bytes of their images."""

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from finetune.data.images.image_files import read_encoded
from finetune.data.message_parts import content_parts
from finetune.data.sample import BadRow, DataError, Sample
from finetune.data.samples import Samples
from finetune.data.sources.arrow_rows import ORIGIN
from finetune.errors import InputError, UserError
from finetune.files.atomic_writes import writing_file
from qwenvl.images.image_urls import is_data_uri, is_url
from qwenvl.images.images import ImageAccess, ImageError, load_image
from qwenvl.images.resizing import resize


class BadImages(DataError):
    """Samples that have images that cannot be read."""


GROUP_ROWS = 100
"""Rows of a row group, the most that are in memory at once."""
JPEG_QUALITY = 95


@cache
def schema() -> pa.Schema:
    """Columns of the files: `messages`, `images` in reading order, and `origin`, where the row was read from."""
    import datasets

    flag, text = datasets.Value("bool"), datasets.Value("string")
    part = {"type": text, "text": text, "grounding": flag, "numbered": flag}
    features = datasets.Features(
        {
            "messages": datasets.List(
                {"role": text, "content": datasets.List(part), "grounding": flag, "train": flag}
            ),
            "images": datasets.List(datasets.Image()),
            "origin": {name: datasets.Value(str(kind)) for name, kind in ORIGIN.items()},
        }
    )
    return features.arrow_schema


def make_row(sample: Sample, image_size: int | None) -> dict[str, Any]:
    """The row of a sample. Each of its images is decoded, so that a damaged one is found now and not in training.

    Args:
        image_size: pixels; an image with a longer side is stored as a smaller copy. None stores all as they are.

    Raises:
        BadRow: an image that cannot be read.
    """
    messages: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for message in sample.messages:
        for part in content_parts(message):
            if part["type"] == "image":
                name = f"images[{len(images)}]"
                try:
                    images.append(make_image(part["image"], sample.access, image_size))
                except InputError as error:
                    raise BadRow(sample.origin, name, str(error)) from error
        parts = [{key: value for key, value in part.items() if key != "image"} for part in content_parts(message)]
        flags = {key: message.get(key) for key in ("grounding", "train")}
        messages.append({"role": message["role"], "content": parts, **flags})
    origin = {"file": sample.origin.file, "row": sample.origin.row}
    return {"messages": messages, "images": images, "origin": origin}


def make_image(source: Any, access: ImageAccess, image_size: int | None) -> dict[str, Any]:
    """The {"bytes", "path"} of an image: its encoded bytes, or those of a copy not larger than `image_size`.

    Raises:
        InputError: it cannot be read.
    """
    path = _file_name(source)
    data = read_encoded(source, access)
    try:
        image = load_image({"bytes": data, "path": path}, access=access)
    except ImageError as error:
        raise UserError(f"{path or 'the image'}: {error.reason}; {error.remedy}") from error
    if image_size is not None and max(image.size) > image_size:
        data = _smaller(image, image_size, is_jpeg=data.startswith(b"\xff\xd8\xff"))
    return {"bytes": data, "path": path}


def _file_name(source: Any) -> str | None:
    """What messages call the image."""
    path = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(path, str) or is_url(path) or is_data_uri(path):
        return None
    return Path(path).name or None


def _smaller(image: Image.Image, longer_side: int, *, is_jpeg: bool) -> bytes:
    """Encode a smaller copy: JPEG for what was JPEG, else PNG, which is lossless."""
    scale = longer_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = resize(image, width, height)
    file = io.BytesIO()
    if is_jpeg:
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    else:
        image.save(file, "PNG")
    return file.getvalue()


def write_shard(
    file: Path,
    samples: Samples,
    indices: Sequence[int],
    *,
    image_size: int | None,
    skip_bad: bool,
    threads: Executor,
    add_done: Callable[[int], None],
) -> list[BadRow]:
    """Write the samples of these indices as one Parquet file.

    Args:
        skip_bad: leave samples with a bad image out; otherwise one of them keeps the file from being written.
        threads: decode the images.
        add_done: called with the number of rows that were written, a group at a time.

    Returns:
        The problems of the samples left out.

    Raises:
        BadImages: with the problems of all bad samples; no file is written.
    """
    problems: list[BadRow] = []
    with writing_file(file) as partial:
        with pq.ParquetWriter(partial, schema(), use_dictionary=False) as writer:
            for start in range(0, len(indices), GROUP_ROWS):
                group = [samples[index] for index in indices[start : start + GROUP_ROWS]]
                rows = list(threads.map(lambda sample: try_row(sample, image_size), group))
                problems += [row for row in rows if isinstance(row, BadRow)]
                if good := [row for row in rows if not isinstance(row, BadRow)]:
                    writer.write_table(pa.Table.from_pylist(good, schema()))
                add_done(len(group))
        if problems and not skip_bad:
            raise BadImages(f"{file} is not written", problems)
    return problems


def try_row(sample: Sample, image_size: int | None) -> dict[str, Any] | BadRow:
    """As `make_row`, with the problem in place of the row."""
    try:
        return make_row(sample, image_size)
    except BadRow as problem:
        return problem
