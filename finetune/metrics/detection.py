"""All boxes of a reply against all gold boxes: precision, recall and F1 at an IoU of 0.5.

Gold boxes and the boxes of a reply are matched one to one, so that as many as possible are matched: a second box on
the same object is one too many. Where objects are told apart by name, only boxes of the same name can match.

`qwenvl`, which reads the markup, is imported inside functions, see `metrics.boxes`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune.metrics.boxes import IOU_THRESHOLD, Box, as_markup, box_iou
from finetune.metrics.text_form import composed


@dataclass(frozen=True, slots=True)
class NamedBox:
    """A box in pixels, and what it is called; None where it has no name."""

    label: str | None
    box: Box


@dataclass(frozen=True, slots=True)
class GoldBoxes:
    """What is in an image.

    Attributes:
        boxes: all of them; empty where there is nothing to find.
        names_count: only boxes of the same name match.
    """

    boxes: tuple[NamedBox, ...]
    names_count: bool


@dataclass(frozen=True, slots=True)
class Matched:
    """The boxes of one reply.

    Attributes:
        predicted, gold: the boxes of the reply, and those that are right.
        pairs: (predicted, gold), the numbers of those that match.
    """

    predicted: tuple[NamedBox, ...]
    gold: tuple[NamedBox, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def counts(self) -> "Counts":
        found = len(self.pairs)
        return Counts(found, len(self.predicted) - found, len(self.gold) - found)


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of boxes: gold ones that were found, boxes too many, and gold ones that were missed."""

    found: int = 0
    extra: int = 0
    missed: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.found + other.found, self.extra + other.extra, self.missed + other.missed)

    @property
    def precision(self) -> float | None:
        """The share of the boxes of replies that are right; None where there are none."""
        return _share(self.found, self.found + self.extra)

    @property
    def recall(self) -> float | None:
        """The share of the gold boxes that were found; None where there are none."""
        return _share(self.found, self.found + self.missed)

    @property
    def f1(self) -> float:
        """2 found / (boxes of replies + gold boxes); 1.0 where there are none of either: nothing, and nothing said."""
        share = _share(2 * self.found, 2 * self.found + self.extra + self.missed)
        return 1.0 if share is None else share

    def summary(self) -> dict[str, float | None]:
        """As in `results.json`."""
        return {
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "found": self.found,
            "extra": self.extra,
            "missed": self.missed,
        }


def reply_boxes(reply: str, image_size: tuple[int, int], *, quads: bool = True) -> tuple[NamedBox, ...]:
    """All boxes of a reply in pixels, in order; of a quad, the upright rectangle around it.

    Args:
        reply, image_size: as in `boxes.first_box`.
        quads: take quads too.
    """
    from qwenvl.text.grounding import parse_grounding

    found = []
    for region in parse_grounding(as_markup(reply)).regions:
        if region.kind == "quad" and not quads:
            continue
        points = region.to_pixels(*image_size).points
        xs, ys = [x for x, _ in points], [y for _, y in points]
        found.append(NamedBox(region.label, (min(xs), min(ys), max(xs), max(ys))))
    return tuple(found)


def match_boxes(predicted: Sequence[NamedBox], gold: GoldBoxes) -> Matched:
    """Match as many boxes as can be, one to one, each pair with an IoU of at least 0.5.

    Names are compared in Unicode's form C, without regard to case and to white space around them.
    """
    names = [_name(box.label) for box in gold.boxes]
    candidates = []
    for box in predicted:
        name = _name(box.label)
        candidates.append(
            [
                number
                for number, right in enumerate(gold.boxes)
                if (not gold.names_count or name == names[number]) and box_iou(box.box, right.box) >= IOU_THRESHOLD
            ]
        )
    return Matched(tuple(predicted), gold.boxes, tuple(sorted(largest_matching(candidates))))


def largest_matching(candidates: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The most pairs (left, right) in which no number comes twice.

    Source: augmenting paths, Berge 1957 and Kuhn 1955; each path is searched breadth first, so that replies that
    repeat a box a thousand times need no deep recursion.

    Args:
        candidates: for each left number, the right numbers that it may be matched with.
    """
    partner: dict[int, int] = {}  # right -> left
    for start in range(len(candidates)):
        came_from: dict[int, tuple[int, int | None]] = {}  # right -> the left before it, and the right before that
        queue: list[tuple[int, int | None]] = [(start, None)]
        end = None
        while queue and end is None:
            following: list[tuple[int, int | None]] = []
            for left, before in queue:
                for right in candidates[left]:
                    if right not in came_from:
                        came_from[right] = left, before
                        if right not in partner:
                            end = right
                            break
                        following.append((partner[right], right))
                if end is not None:
                    break
            queue = following
        while end is not None:
            left, before = came_from[end]
            partner[end] = left
            end = before
    return [(left, right) for right, left in partner.items()]


def count_by_name(replies: Iterable[tuple[Matched, str | None]]) -> dict[str, Counts]:
    """The boxes of several replies by their names, the most frequent gold ones first.

    A box of a reply counts for the gold box that it matches, else for its own name.

    Args:
        replies: with each, the name of all its boxes; None where each box has its own.
    """
    shown: dict[str, str] = {}
    counts: dict[str, Counts] = {}

    def add(label: str | None, count: Counts) -> None:
        key = _name(label) or ""
        shown.setdefault(key, (label or "").strip())
        counts[key] = counts.get(key, Counts()) + count

    for matched, name in replies:
        hit = dict(matched.pairs)
        rights = set(hit.values())
        for number, box in enumerate(matched.gold):
            add(name or box.label, Counts(found=1) if number in rights else Counts(missed=1))
        for number, box in enumerate(matched.predicted):
            if number not in hit:
                add(name or box.label, Counts(extra=1))
    order = sorted(counts, key=lambda key: (-(counts[key].found + counts[key].missed), key))
    return {shown[key]: counts[key] for key in order}


def _name(label: str | None) -> str | None:
    return None if label is None else composed(label).strip().casefold()


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
