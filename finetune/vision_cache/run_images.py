"""The distinct images that a run opens: those of its samples and of its evaluation's questions."""

import contextlib
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np

from finetune.batches.image_request import ImageRequest
from finetune.data.checks.checked import Checked
from finetune.data.checks.rules import Rules
from finetune.data.epoch_draw import epochs_of
from finetune.data.message_parts import image_sources
from finetune.data.row_progress import RowProgress
from finetune.data.samples import Samples
from finetune.data.shown_rows import shown_samples
from finetune.data.worker_processes import map_chunks
from finetune.evaluation.question import Question
from finetune.recipe import Recipe
from finetune.vision_cache.cache import ImageHandles

CHUNK = 256
"""Samples or questions that one task of a worker process looks at."""

Entry = tuple[int, int]
"""Which sample or question, and which of its images."""


class ImageLists(Protocol):
    """A list of images for each sample or question, made when it is asked for."""

    @property
    def name(self) -> str:
        """Of the part of the data: "train", "eval" or "questions"."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> list[ImageRequest]: ...

    def sample(self, index: int, /) -> tuple[int, str]:
        """Number in its part of the data of the sample or question with this index, and its file and row."""
        ...


class SampleImages:
    """The images of some samples, without those of turns that are left out.

    Args:
        samples, checked, rules: see `checking.look_at`.
        indices: of the kept samples, in any order and number.
        name: of the part of the data.
    """

    def __init__(self, samples: Samples, checked: Checked, rules: Rules, indices: Sequence[int], name: str = "train"):
        self.name = name
        places = np.searchsorted(checked.kept, np.unique(np.asarray(indices, np.int64)))
        places = places[checked.images[places] > 0]
        self._samples, self._rules = samples, rules
        self._indices, self._counts = checked.kept[places], checked.images[places]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> list[ImageRequest]:
        sample = self._samples[int(self._indices[index])]
        sources = list(image_sources(sample.messages))
        if self._rules.views is not None:
            sources = [picture for source in sources for picture in self._rules.views.pictures(source)]
        if len(sources) != self._counts[index]:
            sources = self._rules.fit(sample.messages).rendered.images
        return [
            ImageRequest(source, sample.access, f"{sample.origin}, image {1 + place // self._rules.pictures}")
            for place, source in enumerate(sources)
        ]

    def sample(self, index: int) -> tuple[int, str]:
        number = int(self._indices[index])
        return number, str(self._samples[number].origin)


class QuestionImages:
    """The images of questions."""

    name = "questions"

    def __init__(self, questions: Sequence[Question]):
        self._questions = questions

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> list[ImageRequest]:
        question = self._questions[index]
        return [ImageRequest(source, question.access, str(question.origin)) for source in question.pictures]

    def sample(self, index: int) -> tuple[int, str]:
        return index, str(self._questions[index].origin)


class RunImages:
    """Several `ImageLists` as one."""

    def __init__(self, parts: Sequence[ImageLists]):
        self._parts = list(parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> list[ImageRequest]:
        part, index = self._find(index)
        return part[index]

    def sample(self, index: int) -> tuple[str, int, str]:
        """Name of the part, number in it, and file and row of the sample or question with this index."""
        part, index = self._find(index)
        return part.name, *part.sample(index)

    def _find(self, index: int) -> tuple[ImageLists, int]:
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

    def request(self, entry: Entry) -> ImageRequest:
        """One image."""
        return self[entry[0]][entry[1]]


def images_of_run(
    recipe: Recipe,
    rules: Rules,
    samples: Mapping[str, Samples],
    checked: Mapping[str, Checked],
    questions: Sequence[Question] = (),
) -> RunImages:
    """The images that a run trains on, evaluates on and replies to.

    Args:
        samples, checked: for "train" and, if the recipe evaluates, "eval".
        questions: of the evaluation's task.
    """
    parts: list[ImageLists] = []
    for name, part in samples.items():
        if name == "eval":
            assert recipe.evaluate is not None, "evaluation data comes from this section"
            shown = shown_samples(part, checked[name], recipe.evaluate.predictions)
            indices = checked[name].weighted_indices(recipe.seed)[: recipe.evaluate.limit] + shown
        else:
            indices = drawn_in_run(recipe, checked[name])
        parts.append(SampleImages(part, checked[name], rules, indices, name))
    return RunImages([*parts, QuestionImages(questions)])


def drawn_in_run(recipe: Recipe, checked: Checked) -> list[int]:
    """The training samples that the epochs of a run draw."""
    draws = checked.epochs(recipe.seed)
    if draws is None:
        return checked.weighted_indices(recipe.seed)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return draws.used(epochs_of(recipe, draws.size, processes)).tolist()


def find_images(
    images: RunImages,
    handles: ImageHandles,
    *,
    share: tuple[int, int] = (0, 1),
    show_progress: bool = True,
    processes: int | None = None,
) -> dict[bytes, Entry]:
    """Find every distinct image by its handle, with the first entry that has it. No image is decoded.

    Args:
        share: (index, count): look at this one of `count` shares of the entries.
        show_progress, processes: see `checking.look_at`.

    Raises:
        WorkerDied: a worker process ended unexpectedly.
    """
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    chunks = chunks[share[0] :: share[1]]
    found: dict[bytes, Entry] = {}
    entries = sum(map(len, chunks))
    with (
        RowProgress("finding images", entries) if show_progress else contextlib.nullcontext() as progress,
        contextlib.closing(map_chunks(find_chunk, (images, handles), chunks, processes)) as results,
    ):
        for chunk, result in zip(chunks, results, strict=True):
            for handle, entry in result.items():
                found.setdefault(handle, entry)
            if progress is not None:
                progress.add(len(chunk))
    return found


def find_chunk(task: tuple[RunImages, ImageHandles], chunk: range) -> dict[bytes, Entry]:
    """As `find_images`, for some entries."""
    images, handles = task
    found: dict[bytes, Entry] = {}
    for index in chunk:
        for number, request in enumerate(images[index]):
            found.setdefault(handles.of(request.source, request.access), (index, number))
    return found
