"""One `model` of the API: how its requests are written for it, and what its replies mean in pixels."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune.batches.image_request import ImageRequest
from finetune.replies.task_replies import Style
from finetune.serve.image_parts import image_size
from finetune.serve.messages import open_markup, read_messages
from finetune.serve.pixel_boxes import PixelBox, pixel_boxes
from finetune.serve.request_error import RequestError
from qwenvl import ImageAccess, QwenVLTokenizer
from qwenvl.checkpoint.record import ModelRecord
from qwenvl.text.chat import render_chat, render_prompt
from qwenvl.views import PagePart

DATA_URIS_ALONE = ImageAccess()
"""What images of a request may reach, unless it is said otherwise; paths are refused before it is asked."""
MOST_IMAGES = 16
"""Images of a request, unless it is said otherwise."""


@dataclass(frozen=True)
class RequestPrompt:
    """A request's messages as the model reads them.

    Attributes:
        ids: an image is `<img>`, n_queries x `<imgpad>`, `</img>`.
        images: the pictures, in reading order, one for each image span. Their sources are bytes, or parts of these, so
            that `image_key` is by content. Pictures of one image follow one another, and are decoded together.
        sizes: where boxes are wanted, width and height of each upright image in pixels, up to the last; of the others
            nothing is known, and they are (0, 0).
        opening: markup at the end of the prompt that the reply goes on.
    """

    ids: list[int]
    images: list[ImageRequest]
    sizes: tuple[tuple[int, int], ...] = ()
    opening: str = ""

    def boxes(self, reply: str) -> list[PixelBox]:
        """The boxes of a reply's text, in pixels; see `pixel_boxes`. Of prompts that were rendered with `boxes`."""
        return pixel_boxes(reply, self.sizes, opening=self.opening)


@dataclass(frozen=True)
class ServedName:
    """One `model` of the API: what computes it and how it is asked.

    Attributes:
        name: as clients call it.
        adapter: what the decoder calls its adapter; None is the model without one.
        record: what it was trained as.
        style: how it is asked.
        template: that each message of a user is put into; None is none.
        system: the system message of requests without one; None for the default one.
        stop_ids: tokens that end a reply.
        tokenizer: of the model.
        n_queries: positions of a picture in the prompt.
        takes_images: whether it does.
        folder: what is served, as it was given.
        notes: how it is asked, in words, a line each.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    adapter: str | None
    record: ModelRecord
    style: Style
    template: str | None
    system: str | None
    stop_ids: tuple[int, ...]
    tokenizer: QwenVLTokenizer
    n_queries: int
    takes_images: bool
    folder: str
    notes: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    def render(
        self,
        messages: object,
        *,
        access: ImageAccess = DATA_URIS_ALONE,
        most_images: int = MOST_IMAGES,
        boxes: bool = False,
    ) -> RequestPrompt:
        """Write the messages of a request as the model was trained to read them. Fetches URLs, so it may take a while.

        A system message takes the place of the record's. In a template, and for a base model, which reads raw text,
        the images of a message come before its text.

        Args:
            messages: as `read_messages` takes them.
            access: whether URLs are fetched, and the limits of images.
            most_images: of the request.
            boxes: whether boxes of the reply will be asked for; the image that they are of is decoded then.

        Raises:
            RequestError: messages that are not as they should be, or that this model cannot be asked.
        """
        self._require_askable(messages)
        read = read_messages(
            messages,
            access=access,
            most_images=most_images if self.takes_images else 0,
            template=self.template,
            images_first=self.style == "base",
            markup_is_text=self.record.markup_is_text,
        )
        views = self.record.views
        if self.style == "base":
            message = read.messages[0]
            rendered = render_prompt(
                message["content"],
                self.tokenizer,
                grounding=message.get("grounding", False),
                views=views,
                n_queries=self.n_queries,
            )
        else:
            system = [{"role": "system", "content": self.system}] if self.system is not None else []
            has_own = read.messages[0]["role"] == "system"
            rendered = render_chat(
                read.messages if has_own else [*system, *read.messages],
                self.tokenizer,
                add_generation_prompt=True,
                views=views,
                n_queries=self.n_queries,
            )
        if not rendered.ids:
            raise RequestError("messages[0].content", f"is empty: {self.name} is a base model, which continues text")
        opening = open_markup(read.messages) if self.style == "base" else ""
        sizes = self._sizes(read.images) if boxes else ()
        return RequestPrompt(rendered.ids, [_picture(source) for source in rendered.images], sizes, opening)

    def _require_askable(self, messages: object) -> None:
        """Raises:
        RequestError: this is a base model, and the messages are no single one of the user's.
        """
        if self.style != "base" or not isinstance(messages, Sequence):
            return
        roles = [message.get("role") for message in messages if isinstance(message, dict)]
        if roles != ["user"]:
            raise RequestError(
                "messages",
                f"{self.name} is a base model, which continues raw text and has no turns: send one message, the "
                f"user's, and not {' and '.join(map(str, roles[:3]))}{' and more' if len(roles) > 3 else ''}"[:300],
            )

    def _sizes(self, images: list[ImageRequest]) -> tuple[tuple[int, int], ...]:
        if not images:
            raise RequestError("boxes", "there is no image that boxes could be of: send one, or leave boxes out")
        if self.record.views is not None and not self.record.views.page:
            raise RequestError(
                "boxes", f"{self.name} is not shown images as a whole, which boxes are of: leave boxes out"
            )
        source, access, place = images[-1]
        return (*[(0, 0)] * (len(images) - 1), image_size(source, place, access))


def _picture(source: Any) -> ImageRequest:
    if not isinstance(source, PagePart):
        return source
    whole: ImageRequest = source.source
    return ImageRequest(replace(source, source=whole.source), whole.access, whole.name)
