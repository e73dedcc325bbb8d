"""How high the letters of a page are, measured without reading them.

A page is made black and white by comparing each pixel with the mean around it. Its connected pieces of ink are letters
where they stand in lines: pieces of similar height with a common baseline, each next to another one. A page has text
where there are enough of them, and where they are most of its pieces: leaves, gravel or noise line up by chance, but
most of their pieces do not. The measure is the height of the middle letter, each weighted by its height: in print
about that of an x, in capitals and numbers that of a capital.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

FEWEST = 24
"""Letters of a page, fewer of which are no text: a logo, the axis of a chart."""
LEAST_SHARE, LEAST_OF_ALL = 0.4, 0.15
"""How many have to stand in lines: of the pieces that are large enough for letters, and of all but single pixels."""
MOST_FILLED = 0.85
"""Share of its box that a letter inks, unless it is as narrow as an l: dots, bricks and bars have all of it."""
LONGEST, SHORTEST = 2000, 1200
"""Pixels of the longer side in which pages are measured: larger ones are reduced, smaller ones enlarged."""
_MOST_ENLARGED = 4
MOST_ALIKE = 0.5
"""Share of the letters that are as large and as black as one another: more are windows, or the dots of a rule."""
_LEAST_FILLED = 0.12  # of a letter's box
_CONTRAST = 0.15  # of the range of grey: by how much ink differs from the mean around it
_LEAST_CONTRAST = 12.0  # levels: less is noise
_SMALLEST = 4  # pixels of a letter in both directions, as measured
_SURE = 8  # pixels of a letter, as measured, above which none are lost
_LARGEST = 0.1  # of the page's height
_MOST_PIECES = 40_000  # more than a page of a newspaper has
_NEIGHBOURS = 160  # pieces to look among for the next letter of a line


@dataclass(frozen=True)
class Pieces:
    """Connected pieces of ink, (pieces,) int each: edges in pixels, right and bottom excluded; pixels of ink."""

    left: np.ndarray
    top: np.ndarray
    right: np.ndarray
    bottom: np.ndarray
    ink: np.ndarray


def letter_height(image: Image.Image) -> float | None:
    """The height of the middle letter in pixels of the image, by the rule above; None where there is no text.

    Args:
        image: upright.
    """
    grey = image.convert("L")
    longer = max(grey.size)
    scale = LONGEST / longer if longer > LONGEST else min(_MOST_ENLARGED, max(1.0, SHORTEST / longer))
    if scale == 1:
        return _measured(grey)
    size = (max(1, round(grey.width * scale)), max(1, round(grey.height * scale)))
    height = _measured(grey.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC))
    if scale < 1 and (height is None or height < _SURE):
        # The letters of a large drawing may be gone, or only its largest be left: its middle as it is.
        x, y = (max(0, (side - LONGEST) // 2) for side in grey.size)
        middle = _measured(grey.crop((x, y, min(grey.width, x + LONGEST), min(grey.height, y + LONGEST))))
        if middle is not None:
            return middle
    return None if height is None else height / scale


def _measured(grey: Image.Image) -> float | None:
    levels = np.asarray(grey, np.int16)
    low, middle, high = np.percentile(levels[::4, ::4], (1, 50, 99))
    # Print is darker than its paper, or on a dark page lighter. Where it is the other way round, the gaps between
    # letters would be taken for letters.
    is_dark = middle >= (low + high) / 2
    for dark in (is_dark, not is_dark):
        heights = letters(pieces(ink_of(grey, dark, max(_LEAST_CONTRAST, _CONTRAST * (high - low)))), grey.height)
        if len(heights):
            return _middle(heights)
    return None


def _middle(heights: np.ndarray) -> float:
    """The median, each weighted by itself, so that the many dots of a dotted line count little."""
    ordered = np.sort(heights)
    total = np.cumsum(ordered)
    return float(ordered[np.searchsorted(total, total[-1] / 2)])


def ink_of(grey: Image.Image, dark: bool, contrast: float) -> np.ndarray:
    """(height, width) bool: what is darker, or lighter, than the mean around it by more than `contrast` levels."""
    levels = np.asarray(grey, np.int16)
    around = np.asarray(grey.filter(ImageFilter.BoxBlur(max(8, max(grey.size) // 60))), np.int16)
    return around - levels > contrast if dark else levels - around > contrast


def pieces(ink: np.ndarray) -> Pieces:
    """The connected pieces of ink, corners included.

    Args:
        ink: (height, width) bool.
    """
    height, width = ink.shape
    edges = np.diff(ink.astype(np.int8), axis=1, prepend=0, append=0)
    row, start = np.nonzero(edges == 1)
    stop = np.nonzero(edges == -1)[1]  # of each run of ink, in the same order
    if not len(row):
        none = np.zeros(0, np.int64)
        return Pieces(none, none, none, none, none)
    # Two runs touch if they are in neighbouring rows and overlap, corners included: of the sorted runs of the row
    # above, those from the first that ends late enough to the last that begins early enough.
    place = row * (width + 2)
    first = np.searchsorted(place + stop, place - (width + 2) + start, side="left")
    last = np.searchsorted(place + start, place - (width + 2) + stop, side="right")
    counts = np.maximum(last - first, 0)
    below = np.repeat(np.arange(len(row)), counts)
    above = np.arange(len(below)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    label = _joined(len(row), above, below)
    _, number = np.unique(label, return_inverse=True)
    count = int(number.max()) + 1

    def smallest(values: np.ndarray) -> np.ndarray:
        kept = np.full(count, max(height, width) + 1, np.int64)
        np.minimum.at(kept, number, values)
        return kept

    return Pieces(
        smallest(start),
        smallest(row),
        -smallest(-stop),
        -smallest(-row) + 1,
        np.bincount(number, stop - start, count).astype(np.int64),
    )


def _joined(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each of `count` nodes the smallest node of those it is connected to, by edges `one` - `other`."""
    label = np.arange(count)
    while len(one):
        smaller = np.minimum(label[one], label[other])
        np.minimum.at(label, label[one], smaller)
        np.minimum.at(label, label[other], smaller)
        while not np.array_equal(label, label[label]):
            label = label[label]
        apart = label[one] != label[other]
        one, other = one[apart], other[apart]
    return label


def letters(found: Pieces, page_height: int) -> np.ndarray:
    """The heights of those pieces that stand in lines of text; empty where these are no text, by the rule above."""
    height, width = found.bottom - found.top, found.right - found.left
    # Letters that touch are one piece of their height; lines and frames have little ink for their size.
    fits = (
        (height >= _SMALLEST) & (height <= _LARGEST * page_height) & (width >= _SMALLEST / 2) & (width <= 12 * height)
    )
    filled = found.ink / np.maximum(height * width, 1)
    fits &= (filled >= _LEAST_FILLED) & ((filled <= MOST_FILLED) | (width < 0.6 * height))
    if np.count_nonzero(fits) > _MOST_PIECES:
        return height[:0]
    order = np.flatnonzero(fits)
    order = order[np.lexsort((found.left[order], found.bottom[order]))]
    before, after = _neighbours(found.left[order], found.right[order], found.bottom[order], height[order])
    in_line = before | after
    enough = max(FEWEST, LEAST_SHARE * len(order), LEAST_OF_ALL * np.count_nonzero(found.ink > 1))
    if np.count_nonzero(in_line) < enough or np.count_nonzero(before & after) < FEWEST / 2:
        return height[:0]
    chosen = order[in_line]
    # A tenth more or less is alike.
    sizes = np.round(10 * np.log(np.stack([height, width, found.ink])[:, chosen]))
    _, alike = np.unique(sizes, axis=1, return_counts=True)
    return height[chosen] if alike.max() <= MOST_ALIKE * len(chosen) else height[:0]


def _neighbours(
    left: np.ndarray, right: np.ndarray, bottom: np.ndarray, height: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which pieces have one before them in their line, and which have one after them; sorted by bottom and left."""
    has_before, has_after = np.zeros(len(left), bool), np.zeros(len(left), bool)
    # Pieces with a common baseline are near one another in this order, however many columns there are.
    for step in range(1, min(_NEIGHBOURS, len(left))):
        here, there = slice(0, len(left) - step), slice(step, None)
        higher = np.maximum(height[here], height[there])
        alike = higher <= 1.9 * np.minimum(height[here], height[there])
        alike &= bottom[there] - bottom[here] <= 1 + 0.12 * higher
        near, far = -0.2 * higher, 0.9 * higher
        gap = left[there] - right[here]
        follows = alike & (gap >= near) & (gap <= far)
        has_after[here] |= follows
        has_before[there] |= follows
        gap = left[here] - right[there]
        precedes = alike & (gap >= near) & (gap <= far)
        has_after[there] |= precedes
        has_before[here] |= precedes
    return has_before, has_after
