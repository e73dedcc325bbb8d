"""Read grounding markup: `<ref>`, `<box>` and `<quad>` in a text, and the pixels they stand for.

A `<ref>` holds a phrase, and the boxes and quads right after it say where that phrase is; they may also stand without
one. `boxes.py` describes the format and writes it.

`parse_grounding` accepts any text, since a model may write anything: it reports problems and never raises. This module
does not import torch.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qwenvl.text.boxes import CONTROL_TOKEN, UNITS, Box, Quad, image_size, ref_markup, unit_to_pixel

ShapeKind = Literal["box", "quad"]

_POINTS: dict[ShapeKind, int] = {"box": 2, "quad": 4}

# Possessive quantifiers (`*+`, `++`) forbid backtracking, so each body is read once whatever a model wrote into it.
_ANY_POINT = r"\(\s*+-?[0-9]++\s*+,\s*+-?[0-9]++\s*+\)"
_ANY_POINTS = re.compile(rf"\s*+{_ANY_POINT}(?:\s*+,\s*+{_ANY_POINT})*+\s*+")
_EXACT_POINT = r"\([0-9]{1,3},[0-9]{1,3}\)"
_EXACT_POINTS = {kind: re.compile(",".join([_EXACT_POINT] * count)) for kind, count in _POINTS.items()}
_LAYOUT: dict[ShapeKind, str] = {"box": "(x1,y1),(x2,y2)", "quad": "(x1,y1),(x2,y2),(x3,y3),(x4,y4)"}
_EDGE = re.compile(rf"(?<![-0-9]){UNITS}(?![0-9])")
# What may stand between the boxes of one phrase without ending the list.
_LIST_SEPARATORS = re.compile(r"[\s,;，；、]*+")


@dataclass(frozen=True, slots=True)
class Region:
    """One box or quad read from text.

    Attributes:
        kind: "box" or "quad".
        points: normalised corners, integers 0..999; two for a box (top left, bottom right), four for a quad.
        label: the phrase of the `<ref>` it belongs to, as written, or None.
        span: [start, end) of the `<box>...</box>` or `<quad>...</quad>` in the text, in characters.
    """

    kind: ShapeKind
    points: tuple[tuple[int, int], ...]
    label: str | None
    span: tuple[int, int]

    def to_pixels(self, width: int, height: int) -> Box | Quad:
        """The region on an upright image of `width` x `height` pixels: n -> n / 1000 * size.

        Raises:
            InputError: the size is not two positive integers.
        """
        width, height = image_size(width, height)
        points = tuple((unit_to_pixel(x, width), unit_to_pixel(y, height)) for x, y in self.points)
        return Quad(points) if self.kind == "quad" else Box(*points[0], *points[1])


@dataclass(frozen=True, slots=True)
class Problem:
    """A piece of markup that does not follow the format.

    Attributes:
        span: [start, end) of the piece in the text, in characters.
        reason: what is wrong, for people.
        repaired: True where the piece was read as a region nevertheless, False where it was left as text.
    """

    span: tuple[int, int]
    reason: str
    repaired: bool


@dataclass(frozen=True, slots=True)
class Grounding:
    """What `parse_grounding` found: regions and problems, each in the order of the text."""

    text: str
    regions: tuple[Region, ...]
    problems: tuple[Problem, ...]


def grounding_prompt(expression: str) -> str:
    """The question of the published grounding evaluation, `<ref>expression</ref><box>`, which the model completes.

    Render it with `split_markup(..., open_box=True)`, read the answer with `parse_grounding("<box>" + reply)`.

    Raises:
        InputError: the expression is blank or holds a control token.
    """
    return f"{ref_markup(expression)}<box>"


def parse_grounding(text: str) -> Grounding:
    """Read all boxes and quads of a text. Never raises on any string; linear in its length.

    A box takes the phrase of the `<ref>` before it, with nothing but boxes, quads, spaces and list punctuation
    between; otherwise its label is None. A `<ref>` without a box is no problem: questions have them.

    Read and reported (`Problem.repaired`): coordinates outside 0..999 (a model does say 1000), clipped; box corners
    the wrong way round, put in order; spaces, signs or extra zeros between the digits; a missing closing tag after
    complete coordinates (a reply cut at its length limit). Left as text and reported: everything else, such as
    coordinates that are no integers, a wrong number of points, empty phrases, tags without their partner.
    """
    regions: list[Region] = []
    problems: list[Problem] = []
    label: str | None = None
    group_end = 0  # where the last piece of the current phrase's group ended
    for element in _elements(text):
        span = (element.start, element.end)
        if element.state == "stray":
            problems.append(Problem(span, f"</{element.name}> has no <{element.name}> before it", repaired=False))
        elif element.name == "ref":
            label = element.body if _is_well_formed(element) else None
            if label is None:
                wrong = "holds no text" if element.state == "closed" else "has no </ref> before the next control token"
                problems.append(Problem(span, f"<ref> {wrong}", repaired=False))
            group_end = element.end
        else:
            if not _LIST_SEPARATORS.fullmatch(text, group_end, element.start):
                label = None
            points, reasons = _read_points(element, element.name)
            if points is not None:
                regions.append(Region(element.name, points, label, span))
            if reasons:
                problems.append(Problem(span, "; ".join(reasons), repaired=points is not None))
            group_end = element.end
    return Grounding(text, tuple(regions), tuple(problems))


def split_markup(text: str, *, open_box: bool = False) -> list[tuple[str, bool]]:
    """Cut a text into ordinary pieces (False) and grounding tags to be encoded as tokens (True).

    Only the tags of well formed elements are tokens: `<ref>` with a non-blank phrase free of control tokens,
    `<box>(x1,y1),(x2,y2)</box>` and `<quad>` with four points, integers 0..999, nothing added. Any other `<ref>`,
    `<box>`, ... stays ordinary text; `parse_grounding(text).problems` lists those.

    Args:
        text: any string; linear in its length.
        open_box: take a `<box>` that ends the text as a token too: the prompt form of `grounding_prompt`.

    Returns:
        Pieces in order, none empty, no two ordinary ones side by side; joined, they are exactly the text. Pieces
        marked True are in `vocabulary.GROUNDING_TOKENS`.
    """
    pieces: list[tuple[str, bool]] = []
    cursor = 0

    def take_tag(start: int, end: int) -> None:
        nonlocal cursor
        if start > cursor:
            pieces.append((text[cursor:start], False))
        pieces.append((text[start:end], True))
        cursor = end

    for element in _elements(text):
        if _is_well_formed(element):
            take_tag(element.start, element.body_start)
            take_tag(element.body_end, element.end)
        elif open_box and element.name == "box" and element.state == "unclosed" and element.body_start == len(text):
            take_tag(element.start, element.body_start)
    if cursor < len(text):
        pieces.append((text[cursor:], False))
    return pieces


def has_markup(text: str) -> bool:
    """Whether a text has well-formed grounding markup."""
    return any(is_tag for _, is_tag in split_markup(text))


def clamp_to_edge(text: str) -> str:
    """Write coordinates of exactly 1000, in a text's boxes and quads, as 999: the image's far edge in 0..999.

        >>> clamp_to_edge("<box>(0,1000),(1000,1001)</box> 1000")
        '<box>(0,999),(999,1001)</box> 1000'

    Everything else stays as it is, coordinates further out as well.
    """
    if str(UNITS) not in text:
        return text
    kept, cursor = [], 0
    for element in _elements(text):
        if element.name != "ref" and _ANY_POINTS.fullmatch(element.body):
            kept += [text[cursor : element.body_start], _EDGE.sub(str(UNITS - 1), element.body)]
            cursor = element.body_end
    return "".join([*kept, text[cursor:]])


def strip_markup(text: str) -> str:
    """Remove grounding markup from a text: phrases stay without their tags, boxes and quads go with their coordinates.

        >>> strip_markup("<ref>The dog</ref><box>(1,2),(3,4)</box> sleeps.")
        'The dog sleeps.'

    Only what `parse_grounding` reads is removed, repaired or not; unreadable markup stays visible. The result is for
    people and text metrics: the remaining pieces, joined, may spell a tag again.
    """
    cuts = [(*region.span, True) for region in parse_grounding(text).regions]
    for element in _elements(text):
        if element.name == "ref" and _is_well_formed(element):
            cuts += [(element.start, element.body_start, False), (element.body_end, element.end, False)]
    kept: list[str] = []
    cursor, after_shape = 0, False
    for start, end, is_shape in [*sorted(cuts), (len(text), len(text), False)]:
        between = text[cursor:start]
        if after_shape and (not kept or kept[-1][-1].isspace()):
            between = between.lstrip(" ")  # the box stood between two spaces
        if between:
            kept.append(between)
        cursor, after_shape = end, is_shape or (after_shape and not between)
    return "".join(kept)


_TAG_NAMES: dict[str, Literal["ref", "box", "quad"]] = {
    "<ref>": "ref",
    "</ref>": "ref",
    "<box>": "box",
    "</box>": "box",
    "<quad>": "quad",
    "</quad>": "quad",
}


class _Element(NamedTuple):
    """A tag with its body, the text up to the closing or the next tag; positions are offsets into the text."""

    name: Literal["ref", "box", "quad"]
    state: Literal["closed", "unclosed", "stray"]  # stray: a closing tag alone
    start: int
    body_start: int
    body_end: int
    end: int
    body: str


def _elements(text: str) -> Iterator[_Element]:
    """All grounding tags in order; an opening tag is paired with its closing tag if that is the next control token."""
    tokens = list(CONTROL_TOKEN.finditer(text))
    index = 0
    while index < len(tokens):
        token = tokens[index]
        index += 1
        name = _TAG_NAMES.get(token[0])
        if name is None:
            continue
        if token[0].startswith("</"):
            yield _Element(name, "stray", token.start(), token.end(), token.end(), token.end(), "")
            continue
        following = tokens[index] if index < len(tokens) else None
        start, body_start = token.span()
        body_end = following.start() if following else len(text)
        body = text[body_start:body_end]
        if following and following[0] == f"</{name}>":
            index += 1
            yield _Element(name, "closed", start, body_start, body_end, following.end(), body)
        else:
            yield _Element(name, "unclosed", start, body_start, body_end, body_end, body)


def _is_well_formed(element: _Element) -> bool:
    if element.state != "closed":
        return False
    if element.name == "ref":
        return bool(element.body.strip())
    return _EXACT_POINTS[element.name].fullmatch(element.body) is not None


def _read_points(element: _Element, kind: ShapeKind) -> tuple[tuple[tuple[int, int], ...] | None, list[str]]:
    """Normalised points of a box or quad, None if unreadable, and what was wrong with it."""
    body = element.body
    missing_close = [] if element.state == "closed" else [f"<{kind}> has no </{kind}> after its coordinates"]
    if not _ANY_POINTS.fullmatch(body):
        shown = repr(body if len(body) <= 40 else body[:40] + "...")
        return None, [f"<{kind}> holds {shown}, not {_LAYOUT[kind]} in integers", *missing_close]
    numbers = re.findall(r"-?[0-9]+", body)
    if len(numbers) != 2 * _POINTS[kind]:
        return None, [f"<{kind}> holds {len(numbers) // 2} points, not {_POINTS[kind]}", *missing_close]
    reasons = []
    values = []
    for number in numbers:
        value, clipped = _read_coordinate(number)
        values.append(value)
        if clipped:
            reasons.append(f"coordinate {number[:12]} is outside 0..{UNITS - 1}, read as {value}")
    if not reasons and not _EXACT_POINTS[kind].fullmatch(body):
        reasons.append(f"coordinates are not written exactly as {_LAYOUT[kind]}")
    points = tuple(zip(values[0::2], values[1::2], strict=True))
    if kind == "box":
        (x1, y1), (x2, y2) = points
        if x2 < x1 or y2 < y1:
            reasons.append("corners are the wrong way round, put in order")
            points = (min(x1, x2), min(y1, y2)), (max(x1, x2), max(y1, y2))
    return points, reasons + missing_close


def _read_coordinate(number: str) -> tuple[int, bool]:
    """(value clipped to 0..999, whether it was clipped). Decided by length, as int() refuses thousands of digits."""
    digits = number.lstrip("-").lstrip("0")
    if number.startswith("-"):
        return 0, bool(digits)
    if len(digits) > 3:
        return UNITS - 1, True
    return int(digits or "0"), False
