"""Open every image of the data once, as training will: which cannot be decoded, and how long it takes."""

import contextlib
import time
from dataclasses import dataclass

import numpy as np

from finetune.data.checking import Checked, Rules, image_sources
from finetune.data.row_progress import RowProgress
from finetune.data.sample import BadRow
from finetune.data.samples import Samples
from finetune.data.worker_processes import map_chunks
from qwenvl import load_image
from qwenvl.images.images import ImageError

CHUNK = 32
"""Samples whose images are opened at once."""


@dataclass(frozen=True)
class OpenedImages:
    """The result of opening images.

    Attributes:
        opened: images that were opened; one that neighbouring samples share counts once.
        seconds: that it took.
        problems: one for each image of a sample that cannot be decoded. Training would stop at it.
    """

    opened: int
    seconds: float
    problems: list[BadRow]


def open_images(
    samples: Samples, checked: Checked, rules: Rules, *, show_progress: bool = True, processes: int | None = None
) -> OpenedImages:
    """Open every image of the samples that are kept, except those of turns that are left out.

    Args:
        samples, checked, rules: see `checking.look_at`; so are `show_progress` and `processes`.

    Raises:
        WorkerDied: a worker process was killed or crashed.
    """
    kept = checked.kept[checked.images > 0]
    chunks = [range(start, min(start + CHUNK, len(kept))) for start in range(0, len(kept), CHUNK)]
    started, opened = time.monotonic(), 0
    problems: list[BadRow] = []
    with (
        RowProgress("opening images", len(kept), shown=show_progress) as progress,
        contextlib.closing(map_chunks(open_chunk, (samples, rules, kept), chunks, processes)) as results,
    ):
        for chunk, (count, bad) in zip(chunks, results, strict=True):
            opened += count
            problems += bad
            progress.add(len(chunk))
    return OpenedImages(opened, time.monotonic() - started, problems)


def open_chunk(task: tuple[Samples, Rules, np.ndarray], chunk: range) -> tuple[int, list[BadRow]]:
    """Open the images of some of the kept samples; returns their number, and the problems."""
    samples, rules, kept = task
    reasons: dict[str, str | None] = {}
    opened, problems = 0, []
    for index in kept[chunk.start : chunk.stop].tolist():
        sample = samples[index]
        images = rules.fit(sample.messages).rendered.images
        # Images are numbered from the beginning of the row, which may have been left out.
        before = sum(1 for _ in image_sources(sample.messages)) - len(images)
        for number, source in enumerate(images, start=before):
            name = f"{sample.access.root}:{source}" if isinstance(source, str) else None
            if name is None or name not in reasons:
                opened += 1
                reason = None
                try:
                    load_image(source, access=sample.access)
                except ImageError as error:
                    reason = f"{error.reason}; {error.remedy}"
            else:
                reason = reasons[name]
            if name is not None:
                reasons[name] = reason
            if reason is not None:
                problems.append(BadRow(sample.origin, f"images[{number}]", f"cannot be decoded: {reason}"))
    return opened, problems
