"""Whether the text of pages stays legible when they are reduced to the model's pictures: `look_at_letters`.

The model sees each picture as a square of some hundred pixels (448), whatever the page's size. The rule: the text of a
page is hard to read where its middle letter (`letter_height`) is less than `LEAST` pixels high in the model's largest
picture of it, by the stronger of the two reductions. A letter such as e, or a number such as 8, has three strokes and
two gaps above one another. They need five rows of pixels, and six where they do not begin with a row. A model trained
on letters of 9 pixels found none of the numbers on pages where they had 5 (`examples.nano.making.views_experiment`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.check.letter_height import letter_height
from finetune.data.checks.checked import Checked
from finetune.data.checks.rules import Rules
from finetune.data.sample import Origin
from finetune.data.samples import Samples
from finetune.errors import InputError
from qwenvl import load_image
from qwenvl.images.image_urls import is_url
from qwenvl.views import MOST_PARTS, Views, whole_of

LEAST = 6.0
"""Pixels of a letter in the model's picture; lower ones are hard to read."""
MOST_PAGES = 50
MOST_SECONDS = 5.0
_LARGEST_GRID = 4  # that is proposed: 17 pictures are more than 4,000 tokens


@dataclass(frozen=True)
class Page:
    """A page with text that was looked at.

    Attributes:
        origin: of a row that has it.
        size: width and height in pixels.
        letter: height of its middle letter in pixels of the page.
    """

    origin: Origin
    size: tuple[int, int]
    letter: float

    def seen(self, side: int, views: Views | None) -> float:
        """Pixels of its middle letter in the model's picture of `side` pixels that shows it largest."""
        boxes = [(0, 0, *self.size)] if views is None else views.crop_boxes(*self.size)
        return self.letter * max(side / max(right - left, bottom - top) for left, top, right, bottom in boxes)


@dataclass(frozen=True)
class Legibility:
    """What a look at some pages of the data found.

    Attributes:
        looked_at: images that were opened, evenly spaced over the rows that have one; of each row the first.
        rows: that have one.
        pages: those of them with text.
        side: pixels of the model's picture.
        views: by which the model sees them.
    """

    looked_at: int
    rows: int
    pages: Sequence[Page]
    side: int
    views: Views | None

    @property
    def hard(self) -> list[Page]:
        """Pages whose text is hard to read, the hardest first."""
        seen = [(page.seen(self.side, self.views), number) for number, page in enumerate(self.pages)]
        return [self.pages[number] for height, number in sorted(seen) if height < LEAST]

    @property
    def warning(self) -> str:
        """One sentence with the share, an example and the remedy; empty where all text is legible."""
        if not (hard := self.hard):
            return ""
        example = hard[0]
        picture = f"the model's {self.side} x {self.side} pixels"
        picture += "" if self.views is None else f" of its largest part ({self.views})"
        return (
            f"text may be too small to read on {len(hard):,} of {self.looked_at:,} images looked at (of "
            f"{self.rows:,} rows): letters are less than {LEAST:g} pixels high in {picture}, such as {example.origin} "
            f"({example.size[0]:,} x {example.size[1]:,}, letters of {example.letter:.0f} become "
            f"{example.seen(self.side, self.views):.1f}); {self._remedy(hard)}"
        )

    def _remedy(self, hard: Sequence[Page]) -> str:
        crop = "crop the images to what is asked about"
        now = 1 if self.views is None else max(self.views.grid)
        for parts in range(max(2, now + 1), min(_LARGEST_GRID, MOST_PARTS) + 1):
            views = Views(grid=(parts, parts))
            helped = sum(page.seen(self.side, views) >= LEAST for page in hard)
            if 2 * helped >= len(hard):
                of = "" if helped == len(hard) else f" ({helped:,} of these would be legible)"
                return f"data.views: {{page: true, grid: [{parts}, {parts}], overlap: 0.1}} shows parts{of}; or {crop}"
        return crop


def look_at_letters(
    samples: Samples,
    checked: Checked,
    rules: Rules,
    side: int,
    *,
    most_pages: int = MOST_PAGES,
    most_seconds: float = MOST_SECONDS,
) -> Legibility:
    """Measure the letters of some images, evenly spaced over the kept samples that have one; of each the first image.

    Images that cannot be opened are told elsewhere, and those of the web are not fetched.

    Args:
        samples, checked, rules: see `checking.look_at`.
        side: pixels of the model's picture.
        most_pages: images to open.
        most_seconds: no further image is opened after this time.
    """
    with_images = checked.kept[checked.images > 0]
    count = min(most_pages, len(with_images))
    places = np.linspace(0, len(with_images) - 1, count).round().astype(int)
    started = time.monotonic()
    pages = []
    looked_at = 0
    # In an order that is evenly spaced wherever it is broken off.
    for place in places[_spread(count)]:
        if time.monotonic() - started > most_seconds:
            break
        sample = samples[int(with_images[place])]
        source = whole_of(rules.fit(sample.messages).rendered.images[0])
        if is_url(source):
            continue
        try:
            image = load_image(source, access=sample.access)
        except InputError:
            continue
        looked_at += 1
        letter = letter_height(image)
        if letter is not None:
            pages.append(Page(sample.origin, image.size, letter))
    return Legibility(looked_at, len(with_images), pages, side, rules.views)


def _spread(count: int) -> np.ndarray:
    """0 to count - 1, each next one far from those before: multiples of the golden ratio."""
    return np.argsort(np.arange(count) * 0.6180339887498949 % 1)
