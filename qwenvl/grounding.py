"""Grounding markup: `<ref>`, `<box>` and `<quad>` in text, and the pixels they stand for.

The format, as the published checkpoints write and read it:

    <ref>the dog</ref><box>(12,40),(530,998)</box>
    <ref>a sign</ref><quad>(10,20),(300,24),(298,90),(9,85)</quad>

A `<ref>` holds a phrase, the boxes and quads right after it are where that phrase is; they may also stand without one.
Coordinates are integers in [0, 1000): thousandths of the width and the height of the *original* image after its EXIF
rotation, counted from the top left corner, rounded down. The square resize before the vision tower leaves them alone.

Writing takes floor(pixel / size * 1000), reading n / 1000 * size. Markup -> pixels -> markup changes nothing, and
pixels -> markup -> pixels moves an edge by at most size / 1000 pixels. Plain floating point breaks the first promise
(it may give n - 1), so a pixel is taken for the decimal it prints as, and divided exactly.

Writing (`box_markup`, `quad_markup`, `shapes_markup`) is strict and raises: it makes training data. Reading
(`parse_grounding`) never raises and reports instead: it meets whatever a model says. No torch in this file.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal, NamedTuple

REF_OPEN, REF_CLOSE = "<ref>", "</ref>"
BOX_OPEN, BOX_CLOSE = "<box>", "</box>"
QUAD_OPEN, QUAD_CLOSE = "<quad>", "</quad>"
GROUNDING_TAGS = (REF_OPEN, REF_CLOSE, BOX_OPEN, BOX_CLOSE, QUAD_OPEN, QUAD_CLOSE)

UNITS = 1000
"""Normalised units along each side of the image; coordinates are 0..UNITS - 1."""

_POINTS = {"box": 2, "quad": 4}

# Every string the tokenizer knows as a control token. A phrase may hold none of them: written out by another program,
# it would close the phrase early, open an image or forge a turn.
_CONTROL_TOKEN = re.compile(
    r"</?(?:ref|box|quad|img)>|<imgpad>"
    r"|<\|(?:endoftext|im_start|im_end|extra_(?:20[0-4]|1[0-9][0-9]|[1-9]?[0-9]))\|>"
)
# Possessive quantifiers (`*+`, `++`) forbid backtracking, so each body is read once whatever a model wrote into it.
_ANY_POINT = r"\(\s*+-?[0-9]++\s*+,\s*+-?[0-9]++\s*+\)"
_ANY_POINTS = re.compile(rf"\s*+{_ANY_POINT}(?:\s*+,\s*+{_ANY_POINT})*+\s*+")
_EXACT_POINT = r"\([0-9]{1,3},[0-9]{1,3}\)"
_EXACT_POINTS = {kind: re.compile(",".join([_EXACT_POINT] * count)) for kind, count in _POINTS.items()}
_LAYOUT = {"box": "(x1,y1),(x2,y2)", "quad": "(x1,y1),(x2,y2),(x3,y3),(x4,y4)"}
# What may stand between the boxes of one phrase without ending the list.
_LIST_SEPARATORS = re.compile(r"[\s,;，；、]*+")


@dataclass(frozen=True, slots=True)
class Box:
    """An upright rectangle in pixels of the upright image, x to the right, y down, edges at `x1 <= x2`, `y1 <= y2`.

    Zero width or height is allowed: a thing smaller than one normalised unit is written and read back as such.

    Raises:
        ValueError: a coordinate is not a finite number, or the corners are the wrong way round.
    """

    x1: float
    y1: float
    x2: float
    y2: float

    def __post_init__(self):
        for name in self.__slots__:
            object.__setattr__(self, name, _finite(getattr(self, name), name, "box"))
        if self.x2 < self.x1 or self.y2 < self.y1:
            raise ValueError(
                f"box corners are the wrong way round: ({self.x1}, {self.y1}), ({self.x2}, {self.y2}). Give the top "
                "left corner first; boxes stored as x, y, width, height need form='xywh'."
            )

    @classmethod
    def from_xywh(cls, x: float, y: float, width: float, height: float) -> "Box":
        """From the top left corner and the size, as COCO and RefCOCO store boxes; ValueError on a negative size."""
        x, y = _finite(x, "x", "box"), _finite(y, "y", "box")
        width, height = _finite(width, "width", "box"), _finite(height, "height", "box")
        if width < 0 or height < 0:
            raise ValueError(f"box of negative size: width {width}, height {height} pixels.")
        return cls(x, y, x + width, y + height)

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The two corners the markup names: top left, bottom right."""
        return (self.x1, self.y1), (self.x2, self.y2)


@dataclass(frozen=True, slots=True)
class Quad:
    """Four corners (x, y) in pixels of the upright image, kept in the order given; mostly for slanted text.

    Raises:
        ValueError: not four points of two finite numbers.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self):
        try:
            points = [(x, y) for x, y in self.points]
        except (TypeError, ValueError):
            points = []
        if len(points) != 4:
            raise ValueError(f"a quad is four (x, y) points, not {self.points!r}.")
        object.__setattr__(
            self, "points", tuple((_finite(x, "x", "quad"), _finite(y, "y", "quad")) for x, y in points)
        )


@dataclass(frozen=True, slots=True)
class Region:
    """One box or quad read from text.

    Attributes:
        kind: "box" or "quad".
        points: normalised corners, integers 0..999; two for a box (top left, bottom right), four for a quad.
        label: the phrase of the `<ref>` it belongs to, as written, or None.
        span: [start, end) of the `<box>...</box>` or `<quad>...</quad>` in the text, in characters.
    """

    kind: Literal["box", "quad"]
    points: tuple[tuple[int, int], ...]
    label: str | None
    span: tuple[int, int]

    def to_pixels(self, width: int, height: int) -> Box | Quad:
        """The region on an upright image of `width` x `height` pixels: n -> n / 1000 * size.

        Raises:
            ValueError: the size is not two positive integers.
        """
        width, height = _image_size(width, height)
        points = tuple((_unit_to_pixel(x, width), _unit_to_pixel(y, height)) for x, y in self.points)
        return Quad(points) if self.kind == "quad" else Box(*points[0], *points[1])


@dataclass(frozen=True, slots=True)
class Problem:
    """A piece of markup that is not as the format wants it.

    Attributes:
        span: [start, end) of the piece in the text, in characters.
        reason: what is wrong, for people.
        repaired: True where the piece was read as a region all the same, False where it was left as text.
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


def box_markup(
    box: Box | Sequence[float],
    *,
    width: int,
    height: int,
    form: Literal["xyxy", "xywh"] = "xyxy",
    label: str | None = None,
) -> str:
    """A pixel box as markup.

        >>> box_markup([64, 48, 320, 240], width=640, height=480, label="the dog")
        '<ref>the dog</ref><box>(100,100),(500,500)</box>'

    Args:
        box: a `Box`, or four numbers in pixels, read according to `form`. Parts outside the image are cut off.
        width, height: of the original image after EXIF rotation, pixels.
        form: "xyxy" (two corners) or "xywh" (top left corner, width, height).
        label: the phrase for a `<ref>` before the box; None for a box alone.

    Raises:
        ValueError: not four finite numbers, corners the wrong way round, the box wholly outside the image, an image
            size that is not positive, an unknown form, or a label that is blank or holds a control token.
    """
    if form not in ("xyxy", "xywh"):
        raise ValueError(f"form={form!r} is unknown; use 'xyxy' (two corners) or 'xywh' (corner, width, height).")
    if isinstance(box, Box):
        if form != "xyxy":
            raise ValueError(f"form={form!r} was given with a Box, which holds corners; use Box.from_xywh or numbers.")
    else:
        try:
            numbers = tuple(box)
        except TypeError:
            numbers = ()
        if len(numbers) != 4:
            raise ValueError(f"a box is four numbers, not {box!r}.")
        box = Box(*numbers) if form == "xyxy" else Box.from_xywh(*numbers)
    return shapes_markup([box], width=width, height=height, label=label)


def quad_markup(quad: Quad | Sequence[Sequence[float]], *, width: int, height: int, label: str | None = None) -> str:
    """A pixel quad, a `Quad` or four (x, y) points, as markup; otherwise as `box_markup`.

    Corners outside the image move to its edge one by one, which bends a quad that is partly outside.

    Raises:
        ValueError: as `box_markup`; a quad is wholly outside when the rectangle around it is.
    """
    quad = quad if isinstance(quad, Quad) else Quad(quad)
    return shapes_markup([quad], width=width, height=height, label=label)


def shapes_markup(shapes: Iterable[Box | Quad], *, width: int, height: int, label: str | None = None) -> str:
    """Several boxes and quads of one phrase: `<ref>label</ref><box>..</box><box>..</box>`.

    Raises:
        ValueError: as `box_markup`, or no shape was given.
    """
    width, height = _image_size(width, height)
    written = []
    for shape in shapes:
        kind = "quad" if isinstance(shape, Quad) else "box"
        points = ",".join(f"({x},{y})" for x, y in _normalised_points(shape, width, height))
        written.append(f"<{kind}>{points}</{kind}>")
    if not written:
        raise ValueError("no box or quad was given; a phrase without a place needs no markup.")
    return ("" if label is None else _ref_markup(label)) + "".join(written)


def grounding_prompt(expression: str) -> str:
    """`<ref>expression</ref><box>`: the question of the published grounding evaluation, which the model completes.

    Render it with `split_markup(..., open_box=True)`, read the answer with `parse_grounding(BOX_OPEN + reply)`.

    Raises:
        ValueError: the expression is blank or holds a control token.
    """
    return _ref_markup(expression) + BOX_OPEN


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
            points, reasons = _read_points(element)
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
        Pieces in order, none empty, no two ordinary ones side by side; joined they are the text exactly. True pieces
        are members of `GROUNDING_TAGS`.
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


def strip_markup(text: str) -> str:
    """The text as a person reads it: phrases stay, their tags go, boxes and quads go with their coordinates.

        >>> strip_markup("<ref>The dog</ref><box>(1,2),(3,4)</box> sleeps.")
        'The dog sleeps.'

    Removed is what `parse_grounding` reads, repaired or not; markup it cannot read stays visible. The result is for
    people and text metrics: put together, what is left may spell a tag again.
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


class _Element(NamedTuple):
    """A tag and what belongs to it: offsets into the text, and the text up to the closing or the next tag."""

    name: str  # "ref", "box" or "quad"
    state: Literal["closed", "unclosed", "stray"]  # stray: a closing tag alone
    start: int
    body_start: int
    body_end: int
    end: int
    body: str


def _elements(text: str) -> Iterator[_Element]:
    """All grounding tags in order, an opening tag with its closing one where that is the very next control token."""
    tokens = list(_CONTROL_TOKEN.finditer(text))
    index = 0
    while index < len(tokens):
        token = tokens[index]
        index += 1
        if token[0] not in GROUNDING_TAGS:
            continue
        name = token[0].strip("</>")
        if token[0].startswith("</"):
            yield _Element(name, "stray", token.start(), token.end(), token.end(), token.end(), "")
            continue
        following = tokens[index] if index < len(tokens) else None
        body_end = following.start() if following else len(text)
        end, state = body_end, "unclosed"
        if following and following[0] == f"</{name}>":
            end, state = following.end(), "closed"
            index += 1
        yield _Element(name, state, token.start(), token.end(), body_end, end, text[token.end() : body_end])


def _is_well_formed(element: _Element) -> bool:
    if element.state != "closed":
        return False
    if element.name == "ref":
        return bool(element.body.strip())
    return _EXACT_POINTS[element.name].fullmatch(element.body) is not None


def _read_points(element: _Element) -> tuple[tuple[tuple[int, int], ...] | None, list[str]]:
    """Normalised points of a box or quad, None if unreadable, and what was wrong with it."""
    kind, body = element.name, element.body
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
    """(value clipped to 0..999, whether it had to be). By length, as int() refuses numbers of thousands of digits."""
    digits = number.lstrip("-").lstrip("0")
    if number.startswith("-"):
        return 0, bool(digits)
    if len(digits) > 3:
        return UNITS - 1, True
    return int(digits or "0"), False


def _ref_markup(label: str) -> str:
    if not label.strip():
        raise ValueError(f"the label {label!r} is blank; give a phrase, or None for a box without one.")
    if token := _CONTROL_TOKEN.search(label):
        raise ValueError(
            f"the label {label[:80]!r} holds {token[0]!r} at character {token.start()}, a control token of the model; "
            "take it out of the label."
        )
    return f"{REF_OPEN}{label}{REF_CLOSE}"


def _normalised_points(shape: Box | Quad, width: int, height: int) -> list[tuple[int, int]]:
    xs, ys = zip(*shape.points, strict=True)
    for name, low, high, size in (("width", min(xs), max(xs), width), ("height", min(ys), max(ys), height)):
        # A shape that only touches the left or top edge from outside has no pixel in the image either.
        if low >= size or (low < 0 and high <= 0):
            raise ValueError(
                f"{shape} is wholly outside the image of {width} x {height} pixels (see its {name}). Are these pixels "
                "of another size of the image, from before its EXIF rotation, or in another box form?"
            )
    return [(_pixel_to_unit(x, width), _pixel_to_unit(y, height)) for x, y in shape.points]


def _pixel_to_unit(pixel: float, size: int) -> int:
    """floor(pixel / size * 1000), clipped to 0..999; exact for the decimal the pixel prints as."""
    return min(max(math.floor(Fraction(repr(pixel)) * UNITS / size), 0), UNITS - 1)


def _unit_to_pixel(unit: int, size: int) -> float:
    """unit / 1000 * size, rounded once: a number of three decimals, so it prints as exactly that."""
    return unit * size / UNITS


def _finite(value: float, name: str, shape: str) -> float:
    """The value as Python's own int or float (NumPy scalars become one)."""
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} of a {shape} must be a finite number of pixels, not {value!r}.")
    return float(value)


def _image_size(width: int, height: int) -> tuple[int, int]:
    for name, value in (("width", width), ("height", height)):
        if not isinstance(value, Integral) or value <= 0:
            raise ValueError(f"image {name} must be a positive whole number of pixels, not {value!r}.")
    return int(width), int(height)
