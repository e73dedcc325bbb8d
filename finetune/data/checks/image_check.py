"""Open the images of the data once, as training will: which cannot be decoded, and how long it takes.

Images in files are opened once, however many samples have them. Those that could be decoded are remembered, by path,
size and times of change, or by content where they are inside the data; the next run opens only others.
"""

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
from huggingface_hub import constants

from finetune.data.checks.checked import Checked
from finetune.data.checks.rules import Rules
from finetune.data.images.image_files import check_header, named_page
from finetune.data.message_parts import image_sources
from finetune.data.row_progress import RowProgress
from finetune.data.sample import BadRow
from finetune.data.samples import Samples
from finetune.data.worker_processes import default_processes, map_chunks
from finetune.errors import Failed, InputError
from finetune.files.atomic_writes import make_folder, writing_file
from finetune.quantities import format_duration
from qwenvl import ImageAccess, load_image
from qwenvl.images.image_urls import is_url
from qwenvl.images.images import ImageError
from qwenvl.images.page_references import split_page

CHUNK = 32
"""Images opened at once."""
TRIED = 200
"""Images whose time predicts that of all."""
MOST_SECONDS = 600.0
"""With `auto`, the predicted time up to which all images are decoded."""
REMEMBERED_SECONDS = 3.0  # an opening that is faster is not worth remembering
MOST_REMEMBERED = 8_000_000  # images; 64 MB
_SETTLED = 2.0  # seconds since a file's last change, after which another change gives another time

CheckImages = Literal["auto", "all", "headers"]


@dataclass(frozen=True)
class OpenedImages:
    """The result of opening images.

    Attributes:
        opened: distinct images that were opened.
        seconds: that it took.
        problems: one for each image of a sample that cannot be decoded.
        samples: numbers of the samples with problems, ascending.
        remembered: images that were not opened, as they could be decoded before.
        note: why only headers were read; empty where the images were decoded.
    """

    opened: int
    seconds: float
    problems: list[BadRow]
    samples: tuple[int, ...] = ()
    remembered: int = 0
    note: str = ""


class _Opened(NamedTuple):
    """Of a chunk: images opened and remembered, (number of the entry, reason) of bad ones, stamps of good ones."""

    opened: int
    remembered: int
    bad: list[tuple[int, str]]
    good: list[int]


@dataclass(frozen=True)
class Entries:
    """Distinct images to open, in the order of the data; pickles to worker processes.

    Attributes:
        samples: of the data.
        rules: they were checked by.
        indices: (images,) int64, a sample that has the image.
        numbers: (images,) int64, which of the sample's images it is.
        counts: (images,) int64, images that the sample has after turns were left out; one is one with views too.
        known: sorted uint64, stamps of images that could be decoded before.
        decodes: False reads headers only.
        urls: whether images of the web are fetched.
    """

    samples: Samples
    rules: Rules
    indices: np.ndarray
    numbers: np.ndarray
    counts: np.ndarray
    known: np.ndarray
    decodes: bool
    urls: bool


def open_images(
    samples: Samples,
    checked: Checked,
    rules: Rules,
    mode: CheckImages = "all",
    *,
    show_progress: bool = True,
    processes: int | None = None,
) -> OpenedImages:
    """Open every image of the samples that are kept, except those of turns that are left out.

    Args:
        samples, checked, rules: see `checking.look_at`; so are `show_progress` and `processes`.
        mode: "all" decodes all images, "headers" reads what kind of file each is, "auto" decodes all where the first
            `TRIED` predict less than `MOST_SECONDS`, and reads headers elsewhere. Only "all" fetches URLs.

    Raises:
        WorkerDied: a worker process was killed or crashed.
    """
    started = time.monotonic()
    counts, keys = _images_of(checked)
    ends = counts.cumsum()
    _, firsts = np.unique(keys, return_index=True)
    places = np.union1d(firsts[keys[firsts] != 0] if len(keys) else firsts, np.flatnonzero(keys == 0))
    rows = np.searchsorted(ends, places, side="right")
    entries = Entries(
        samples,
        rules,
        checked.kept[rows],
        places - (ends[rows] - counts[rows]),
        counts[rows],
        _remembered(),
        mode != "headers",
        mode == "all",
    )
    tried, note = 0, "only the headers of images were read (data.check_images: headers)"
    bad: list[tuple[int, str]] = []
    good: list[int] = []
    opened = remembered = 0

    def take(result: _Opened) -> None:
        nonlocal opened, remembered
        opened, remembered = opened + result.opened, remembered + result.remembered
        bad.extend(result.bad)
        good.extend(result.good)

    with RowProgress("opening images", len(places), unit="images", shown=show_progress) as progress:
        if mode == "auto":
            # Spread over the data: the first ones may all be of one kind.
            while tried < min(TRIED, len(places)) and time.monotonic() - started < MOST_SECONDS / 10:
                chunk = range(tried, min(tried + CHUNK, len(places)))
                take(open_chunk(entries, chunk))
                progress.add(len(chunk))
                tried = chunk.stop
            seconds = (time.monotonic() - started) / max(opened, 1)
            predicted = seconds * (len(places) - tried) / (processes or default_processes())
            if opened and predicted > MOST_SECONDS:
                entries = replace(entries, decodes=False)
                note = (
                    f"decoding all {len(places):,} images would take {format_duration(predicted)}: {tried:,} were "
                    "decoded, of the others the headers were read (data.check_images: all decodes all)"
                )
        chunks = [range(start, min(start + CHUNK, len(places))) for start in range(tried, len(places), CHUNK)]
        with contextlib.closing(map_chunks(open_chunk, entries, chunks, processes)) as results:
            for chunk, result in zip(chunks, results, strict=True):
                take(result)
                progress.add(len(chunk))
    taken = time.monotonic() - started
    if good and taken > REMEMBERED_SECONDS:
        _remember(entries.known, good)
    numbers, problems = _problems(samples, checked, places, bad)
    return OpenedImages(opened, taken, problems, numbers, remembered, "" if entries.decodes else note)


def _images_of(checked: Checked) -> tuple[np.ndarray, np.ndarray]:
    """Of the kept samples how many images each has, and the keys of these: pictures of one image are one here."""
    return checked.images // checked.pictures, checked.image_keys[:: checked.pictures]


def open_chunk(entries: Entries, chunk: range) -> _Opened:
    """Open some of the images."""
    opened = remembered = 0
    bad, good = [], []
    index = -1
    for place in chunk:
        if entries.indices[place] != index:  # the images of one sample follow one another
            index = int(entries.indices[place])
            sample = entries.samples[index]
            sources = list(image_sources(sample.messages))
            if len(sources) != entries.counts[place]:
                sources = list(image_sources(entries.rules.fit(sample.messages).messages))
        source = sources[int(entries.numbers[place])]
        if is_url(source) and not entries.urls:
            continue
        stamp = _stamp(source, sample.access)
        if stamp is not None and _is_in(entries.known, stamp):
            remembered += 1
            continue
        opened += 1
        try:
            if not entries.decodes:
                check_header(source, sample.access)
                continue
            load_image(source, access=sample.access)
        except ImageError as error:
            bad.append((place, f"{error.reason}; {error.remedy}"))
        except InputError as error:
            bad.append((place, str(error)))
        else:
            good += [stamp] if stamp is not None else []
    return _Opened(opened, remembered, bad, good)


def _problems(
    samples: Samples, checked: Checked, places: np.ndarray, bad: list[tuple[int, str]]
) -> tuple[tuple[int, ...], list[BadRow]]:
    """The numbers of the samples that have one of the bad images, and a problem for each, in the data's order."""
    if not bad:
        return (), []
    counts, keys = _images_of(checked)
    ends = counts.cumsum()
    order = np.argsort(keys, kind="stable")
    in_order = keys[order]
    found: list[tuple[int, int, str]] = []
    for place, reason in bad:
        first = places[place]
        start, stop = (int(np.searchsorted(in_order, keys[first], side)) for side in ("left", "right"))
        same = order[start:stop] if keys[first] else [first]
        found += [(int(one), int(np.searchsorted(ends, one, side="right")), reason) for one in same]
    problems, numbers = [], []
    for place, row, reason in sorted(found):
        index = int(checked.kept[row])
        sample = samples[index]
        # Images are numbered from the beginning of the row, which may have been left out.
        before = sum(1 for _ in image_sources(sample.messages)) - int(counts[row])
        number = before + place - int(ends[row] - counts[row])
        problems.append(BadRow(sample.origin, f"images[{number}]", f"cannot be decoded: {reason}"))
        numbers.append(index)
    return tuple(sorted(set(numbers))), problems


def without(checked: Checked, opened: OpenedImages) -> Checked:
    """What was found in the samples, without those that have images that cannot be decoded: these are left out."""
    if not opened.samples:
        return checked
    stays = ~np.isin(checked.kept, opened.samples)
    dropped = len(checked.kept) - int(stays.sum())
    return replace(
        checked,
        kept=checked.kept[stays],
        lengths=checked.lengths[stays],
        images=checked.images[stays],
        supervised=checked.supervised[stays],
        source=checked.source[stays],
        image_keys=checked.image_keys[np.repeat(stays, checked.images)],
        identities=checked.identities.only(stays),
        problems=[*checked.problems, *opened.problems],
        refused=checked.refused + dropped,
    )


def _stamp(source: Any, access: ImageAccess) -> int | None:
    """64 bits that tell an image from others and from itself after a change; None where it is not remembered."""
    try:
        page = named_page(source, access)
    except InputError:
        return None
    source = source["bytes"] if isinstance(source, Mapping) else source
    rules = f"1 {PIL.__version__} {access.max_pixels} {access.dpi} {page}\n"
    digest = blake2b(rules.encode(), digest_size=8)
    if isinstance(source, bytes):
        digest.update(source)
    elif is_url(source):
        return None
    else:
        source = source if page is None else split_page(source)[0]
        try:
            info = Path(access.root or "", source).stat()
        except (OSError, ValueError):
            return None
        if time.time() - info.st_mtime < _SETTLED:
            return None
        name = os.fspath(Path(access.root or "", source))
        known_by = f"{name}\n{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"
        digest.update(known_by.encode(errors="surrogatepass"))
    return int.from_bytes(digest.digest(), "little")


def _is_in(known: np.ndarray, stamp: int) -> bool:
    value = np.uint64(stamp)
    place = int(np.searchsorted(known, value))
    return place < len(known) and bool(known[place] == value)


def remembered_file() -> Path:
    """Where the stamps of images that could be decoded are, beside the vision cache."""
    return Path(constants.HF_HOME) / "qwenvl-image-check" / "decoded.npy"


def _remembered() -> np.ndarray:
    try:
        known = np.load(remembered_file(), allow_pickle=False)
    except (OSError, ValueError, EOFError):  # none yet, or damaged: all are opened
        known = np.zeros(0, np.uint64)
    return known if known.dtype == np.uint64 and known.ndim == 1 else np.zeros(0, np.uint64)


def _remember(known: np.ndarray, good: list[int]) -> None:
    new = np.unique(np.array(good, np.uint64))
    if len(known) + len(new) <= MOST_REMEMBERED:
        new = np.union1d(_remembered(), new)
    file = remembered_file()
    # What cannot be remembered is opened again.
    with contextlib.suppress(OSError, InputError, Failed):
        make_folder(file.parent)
        with writing_file(file) as partial, partial.open("wb") as opened:
            np.save(opened, new)
