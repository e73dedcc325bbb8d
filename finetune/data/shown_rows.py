"""Which rows a report shows replies to: chosen before any reply is made, so that replies do not decide it."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from finetune.data.checks.checked import Checked
from finetune.data.message_parts import image_sources
from finetune.data.samples import Samples


def choose_shown(parts: Sequence[Sequence[int]], document: Callable[[int], Hashable | None], count: int) -> list[int]:
    """The first rows of different documents, from the sources in turn; where there are too few, other rows as well.

    Args:
        parts: the rows of each source.
        document: a key of what a row is about; None if no other row is about it. Called for no more rows than needed.
        count: rows to choose.
    """
    chosen: list[int] = []
    others: list[int] = []
    seen: set[Hashable] = set()
    left = [iter(part) for part in parts]

    def next_new(rows: Iterable[int]) -> int | None:
        for row in rows:
            about = document(row)
            if about is None or about not in seen:
                seen.add(about)
                return row
            others.append(row)
        return None

    while left and len(chosen) < count:
        for rows in left[: count - len(chosen)]:
            if (row := next_new(rows)) is None:
                left.remove(rows)
            else:
                chosen.append(row)
    return chosen + sorted(others)[: count - len(chosen)]


def document_of(images: Sequence[Any]) -> Hashable | None:
    """A key of a row's images; None where it has none. Nothing is opened."""
    return tuple(map(_image_key, images)) or None


def _image_key(source: Any) -> Hashable:
    if isinstance(source, Mapping):
        if source.get("page") is not None:
            return source["page"], _image_key({**source, "page": None})
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    return hashlib.sha256(source).digest() if isinstance(source, bytes) else str(source)


def shown_samples(samples: Samples, checked: Checked, count: int) -> list[int]:
    """Indices of the kept samples of evaluation data whose replies are shown."""

    def document(index: int) -> Hashable | None:
        return document_of(list(image_sources(samples[index].messages)))

    there = checked.supervised > 0  # not the empty places of rows that are gone since the run began
    sources = [checked.kept[there & (checked.source == number)].tolist() for number in range(len(samples.ranges))]
    return choose_shown(sources, document, count)
