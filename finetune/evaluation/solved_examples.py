"""Solved examples before a question: other questions with their answers, drawn by the question's id.

An example never shares an image or a document with its question, since another question about the same page, with its
answer, may give the right one away. Documents are told apart by the columns of the data that name them, images by
their path or URL, and those that are drawn also by their content.
"""

import hashlib
import os
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.data.images.image_files import read_encoded
from finetune.data.sample import DataError
from finetune.errors import InputError
from qwenvl.images.image_urls import is_data_uri, is_url
from qwenvl.images.page_references import split_page

if TYPE_CHECKING:
    from finetune.evaluation.question import Question
    from finetune.evaluation.questions import Questions

DOCUMENT_COLUMNS = (
    *("docId", "doc_id", "document_id", "documentId", "ucsf_document_id"),  # DocVQA, InfographicVQA
    *("image_id", "imageId", "img_id", "imgname", "image_name", "image_path", "image_local_name", "file_name"),
)
"""Columns of public data whose value names a document or an image; `document` in a source's columns names another."""


class SolvedExamples:
    """The solved examples of each question.

    Args:
        asked: the questions.
        examples: where the examples are drawn from; may be `asked` itself.
        count: examples before each question.

    Raises:
        DataError: answers are hidden, or a question has too few examples about other images and documents.
    """

    def __init__(self, asked: "Questions", examples: "Questions", count: int):
        self._asked, self._examples, self._count = asked, examples, count
        if not examples.answered:
            raise DataError(f"{examples.name}: its answers are hidden; name a source that has some with --shots-from")
        # Another source may be the same data.
        same = asked.rows_fingerprint() == examples.rows_fingerprint()
        self._keys = _keys_of_rows(asked, own_rows=same)
        self._places: dict[str, list[int]] = {}  # key -> the examples that have it
        keys = self._keys if examples is asked else _keys_of_rows(examples, own_rows=same)
        for place in range(len(examples)):
            for key in keys.get(examples.row_of(place), ()):
                self._places.setdefault(key, []).append(place)
        self._drawn: dict[int, list[int]] = {}
        self._digests: dict[tuple[bool, int], frozenset[bytes]] = {}
        fewest, question = min((len(examples) - len(self._excluded(index)), index) for index in range(len(asked)))
        if fewest < count:
            raise self._too_few(fewest, question)

    def of(self, index: int) -> list["Question"]:
        """The examples of the question with this number, the same ones each time.

        Raises:
            DataError: too few examples are about other images, by their content.
        """
        if index not in self._drawn:
            self._drawn[index] = self._draw(index)
        return [self._examples.plain(place) for place in self._drawn[index]]

    def _draw(self, index: int) -> list[int]:
        draw = random.Random(f"solved examples of {self._asked.ids[index]}")
        total = len(self._examples)
        seen = self._excluded(index)
        taken: list[int] = []
        order: list[int] = []
        while len(taken) < self._count:
            if len(seen) == total:
                raise self._too_few(len(taken), index)
            # Drawn one by one while most are left, since a list of all for every question would take long.
            if 2 * len(seen) > total:
                if not order:
                    order = sorted(set(range(total)) - seen)
                    draw.shuffle(order)
                place = order.pop()
            else:
                place = draw.randrange(total)
                if place in seen:
                    continue
            seen.add(place)
            if self._can_show(place, index):
                taken.append(place)
        return taken

    def _can_show(self, place: int, index: int) -> bool:
        """Whether an example's images can be read, and none of them is one of the question's."""
        try:
            shown = self._images(self._examples, place)
        except InputError:
            return False
        try:
            return not shown & self._images(self._asked, index)
        except InputError:  # reported, or counted as wrong, where the question itself is asked
            return True

    def _images(self, questions: "Questions", index: int) -> frozenset[bytes]:
        """Digests of the encoded images of a row, without those behind a URL."""
        key = questions is self._asked, questions.row_of(index)
        if key not in self._digests:
            sources = [source for source in questions.image_sources(index) if not is_url(source)]
            self._digests[key] = frozenset(
                hashlib.sha256(read_encoded(source, questions.access)).digest() for source in sources
            )
        return self._digests[key]

    def _excluded(self, index: int) -> set[int]:
        """The examples that share a row, an image or a document with the question, as far as rows say."""
        return {place for key in self._keys.get(self._asked.row_of(index), ()) for place in self._places.get(key, ())}

    def _too_few(self, count: int, index: int) -> DataError:
        return DataError(
            f"{self._examples.name}: of its {len(self._examples):,} questions, {count:,} are about other images and "
            f"documents than question {self._asked.ids[index]}, too few for {self._count} solved examples. Lower "
            "--shots, or name a larger source with --shots-from; --column document=NAME names the column that tells "
            "documents apart"
        )


def _keys_of_rows(questions: "Questions", own_rows: bool) -> dict[int, tuple[str, ...]]:
    """Row -> what names its images and documents, and with `own_rows` the row itself."""
    keys = {}
    for row, given, images in questions.scan_rows():
        # Images inside the data have no name; those that are drawn are compared by their content.
        paths = [source for source in images if isinstance(source, str)]
        # Two pages of a file are one document.
        named = [
            f"image {path if is_url(path) or is_data_uri(path) else os.path.realpath(split_page(path)[0])}"
            for path in paths
        ]
        keys[row] = (*([f"row {row}"] if own_rows else []), *_documents(given, questions, row), *named)
    return keys


def _documents(given: Mapping[str, Any], questions: "Questions", row: int) -> list[str]:
    """The ids of the row's document and image."""
    own = questions.columns.get("document")
    if own is not None and given.get(own) is None:
        raise DataError(f"{questions.name}: row {row + 1} has no {own}, which the columns name as its document")
    values = [(name, given.get(name)) for name in ([own] if own is not None else DOCUMENT_COLUMNS)]
    return [f"{name} {value}" for name, value in values if isinstance(value, str | int) and value != ""]
