"""Files of several pages as several images: the recipe's `data.pages`.

    Pages(dpi=150, first=8).expand(messages, access)    # scan.pdf -> scan.pdf#1, scan.pdf#2, ...

An image stays a reference: the pages of a file are counted by its structure, and none is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from finetune.data.images.image_files import count_pages, named_page
from finetune.data.images.picture_numbers import refuse_moved_pictures
from finetune.data.sample import BadField
from finetune.errors import InputError
from qwenvl import ImageAccess
from qwenvl.text.image_parts import put_pictures


class Expanded(NamedTuple):
    """Messages whose files of several pages became several images, how many pages were left out, and how many images
    there are more."""

    messages: tuple[Mapping[str, Any], ...]
    left_out: int
    more: int


@dataclass(frozen=True)
class Pages:
    """How a file of several pages, or frames, is read that a row names without a page.

    Attributes:
        dpi: pixels an inch of a PDF's page.
        first: most images that one file becomes.
        on_more: "error" refuses a row whose file has more pages; "drop" leaves those beyond the first out.
    """

    dpi: int
    first: int
    on_more: Literal["error", "drop"] = "error"

    def of(self, source: Any, access: ImageAccess, name: str) -> tuple[list[Any], int]:
        """The images of a source, and how many pages are left out. One that names its page stays as it is.

        Args:
            name: of the image in its row, for errors.

        Raises:
            BadField: a file that cannot be read, or one with more pages than `first`.
        """
        if named_page(source, access) is not None:
            return [source], 0
        try:
            count = count_pages(source, access)
        except InputError as error:
            raise BadField(name, str(error)) from error
        if count == 1:
            return [source], 0
        if count > self.first and self.on_more == "error":
            raise BadField(
                name,
                f"has {count:,} pages, more than data.pages.first={self.first}: raise it, leave the others out with "
                "data.pages.on_more: drop, or name single pages (file.pdf#3)",
            )
        taken = min(count, self.first)
        return [_page_of(source, page) for page in range(1, taken + 1)], count - taken

    def expand(self, messages: Sequence[Mapping[str, Any]], access: ImageAccess) -> Expanded:
        """Put the pages of each image in its place; sources are absolute.

        Raises:
            BadField: as `of`; or the texts name pictures by numbers that would be others'.
        """
        left_out = number = pages = 0
        fixed: int | None = None  # images whose numbers stay
        changed = False  # also where one page is left of a file: its image then names it

        def pages_of(source: Any) -> list[Any]:
            nonlocal left_out, number, pages, fixed, changed
            images, more = self.of(source, access, f"images[{number}]")
            left_out, number, pages = left_out + more, number + 1, pages + len(images)
            changed = changed or more > 0 or len(images) > 1
            if fixed is None and len(images) > 1:
                fixed = number
            return images

        try:
            contents = put_pictures([message["content"] for message in messages], pages_of)
        except BadField:
            raise
        except InputError as error:
            raise BadField("messages", str(error)) from error
        if not changed:
            return Expanded(tuple(messages), left_out, 0)
        if fixed is not None:
            refuse_moved_pictures(messages, fixed, "data.pages")
        expanded = ({**message, "content": content} for message, content in zip(messages, contents, strict=True))
        return Expanded(tuple(expanded), left_out, pages - number)


def _page_of(source: Any, page: int) -> Any:
    if isinstance(source, bytes):
        return {"bytes": source, "path": None, "page": page}
    if isinstance(source, Mapping):
        return {**source, "page": page}
    return f"{source}#{page}"
