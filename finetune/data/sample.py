"""A training sample, where it came from, and the errors for rows and sources that cannot be used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import UserError
from qwenvl.images.images import ImageAccess

SHOWN_PROBLEMS = 20
"""Rows that one error lists; it always says how many there are."""
UNKNOWN_TEXT = "cell whose text is not known"
"""The one key of what stands for a cell of a workbook that shows something else than its value; it says which cell."""


@dataclass(frozen=True)
class Origin:
    """Where a sample came from: `train.jsonl, row 31`.

    Attributes:
        file: the file, folder or hub dataset, as the recipe names it.
        row: counted from 1. In JSON Lines it is the line of the file, counting empty lines.
    """

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True)
class Sample:
    """One conversation to train on, without pixels: images are the data's references to them until
    `load_image(source, access=sample.access, name=str(sample.origin))` opens them.

    Attributes:
        messages: as `qwenvl.chat.render_chat` takes them. The source of an image part is an absolute path, a data URI,
            a URL, encoded bytes, or {"bytes", "path"}.
        origin: the row it was made from.
        access: what its image references may reach: the source's own folder, unless the recipe says another.
        pages_left_out: pages of its files that are not among its images, as `data.pages` says.
        more_pages: images that it has more since files became their pages.
        unread: the columns of its row, and keys of its turns, that hold something and are not read.
    """

    messages: tuple[Mapping[str, Any], ...]
    origin: Origin
    access: ImageAccess = field(default_factory=ImageAccess)
    pages_left_out: int = 0
    unread: tuple[str, ...] = ()
    more_pages: int = 0


class BadField(UserError):
    """A field of a row that is not as the format needs it. The formats raise it; `BadRow` adds where the row is.

    Attributes: `field`, as in the row (`images[0]`, `messages[1].content`), and `reason`.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


class BadRow(UserError):
    """A row that cannot be trained on: `train.jsonl, row 31, images[0]: there is no file '...'`.

    Attributes: `origin`, `field`, `reason`.
    """

    def __init__(self, origin: Origin, field: str, reason: str):
        super().__init__(origin, field, reason)
        self.origin, self.field, self.reason = origin, field, reason

    def __str__(self) -> str:
        return f"{self.origin}, {self.field}: {self.reason}"


class DataError(UserError):
    """Data that cannot be used: a source as a whole, or rows of it.

    Attributes: `message`; `problems`, of all rows that cannot be used.
    """

    def __init__(self, message: str, problems: Sequence[BadRow] = ()):
        super().__init__(message, problems)
        self.message, self.problems = message, list(problems)

    def __str__(self) -> str:
        lines = [self.message, *(f"  {problem}" for problem in self.problems[:SHOWN_PROBLEMS])]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  ... and {len(self.problems) - SHOWN_PROBLEMS:,} more")
        return "\n".join(lines)
