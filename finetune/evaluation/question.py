"""One question of an evaluation, and the prompt it becomes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.formats.messages import Message
from finetune.data.images.image_files import read_encoded
from finetune.data.sample import Origin
from finetune.errors import UserError
from finetune.metrics.choices import LETTERS
from finetune.metrics.detection import GoldBoxes
from finetune.metrics.document_fields import FieldsAsked
from finetune.replies.task_replies import Style
from qwenvl import ImageAccess, QwenVLTokenizer
from qwenvl.text.chat import Rendered, render_chat, render_prompt
from qwenvl.views import Views


@dataclass(frozen=True)
class Question:
    """One question, with its gold answers.

    Attributes:
        id: the data's own name for it, else `row 12`, or `row 12.3` for the third question of a row; no other question
            of the same source has it.
        origin: its row.
        text: the question as in the data; the phrase of grounding, the prompt of captions.
        answers: gold answers: the letter for multiple choice, markup for grounding. Empty where they are hidden.
        box: gold box, x1, y1, x2, y2 in pixels of the upright image, or None.
        objects: all gold boxes, where all count; else None.
        image_size: width and height in pixels where there may be a box, else None.
        group: the group that its score counts for, or None.
        images: image sources, as `load_image` takes them; boxes are of these.
        access: which files and URLs they may reach.
        style: how it is asked.
        messages: the prompt's messages, in parts; image parts are filled from `images` in order.
        options: of multiple choice.
        shots: solved examples that are shown before it.
        source: the name of its source, where an evaluation has several.
        fields: of a document, that are asked for; None where no fields are.
        by_likelihood: the reply is the likeliest of the options' letters.
        views: what pictures each image becomes; None is itself alone.
    """

    id: str
    origin: Origin
    text: str
    answers: tuple[str, ...]
    box: tuple[float, float, float, float] | None
    image_size: tuple[int, int] | None
    group: str | None
    images: Sequence[Any]
    access: ImageAccess
    style: Style
    messages: tuple[Message, ...]
    options: tuple[str, ...] = ()
    shots: "tuple[Question, ...]" = ()
    source: str | None = None
    by_likelihood: bool = False
    objects: GoldBoxes | None = None
    fields: FieldsAsked | None = None
    views: Views | None = None

    @property
    def pictures(self) -> list[Any]:
        """The sources of the pictures that the model is shown of its images, without those of solved examples."""
        if self.views is None:
            return list(self.images)
        return [picture for source in self.images for picture in self.views.pictures(source)]

    def render(self, tokenizer: QwenVLTokenizer, n_queries: int = 256) -> Rendered:
        """The prompt: a chat that waits for a reply, or raw text for a base model to continue.

        Open `Rendered.images` with `self.access`. Images of solved examples with another access are read here, and
        come as encoded bytes.

        Raises:
            InputError: text that the tokenizer cannot encode, or an image of a solved example that cannot be read.
        """
        if self.style == "chat":
            return render_chat(
                self._filled(), tokenizer, add_generation_prompt=True, views=self.views, n_queries=n_queries
            )
        content = [part for shot in self.shots for part in shot._solved(self.access)]
        content += self._filled()[0]["content"]
        return render_prompt(content, tokenizer, views=self.views, n_queries=n_queries)

    def choices(self, tokenizer: QwenVLTokenizer) -> tuple[int, ...]:
        """The tokens of the options' letters, of which the likeliest is the reply; empty where any reply may be.

        Raises:
            UserError: a letter with a space before it is not one token of this vocabulary.
        """
        letters = LETTERS[: len(self.options)] if self.by_likelihood else ""
        ids = [tokenizer.encode_text(f" {letter}") for letter in letters]
        if any(len(own) != 1 for own in ids):
            raise UserError(
                "the vocabulary of this model has no single tokens for the letters of options, so the likeliest "
                "cannot be taken; leave out --prompt published"
            )
        return tuple(own[0] for own in ids)

    def _filled(self) -> list[Message]:
        return fill_images(self.messages, self.images)

    def _solved(self, access: ImageAccess) -> list[dict[str, Any]]:
        """The question's parts with its answer, for a prompt whose images are opened with `access`."""
        *parts, last = self._filled()[0]["content"]
        if self.access != access:
            parts = [
                {**part, "image": read_encoded(part["image"], self.access)} if part["type"] == "image" else part
                for part in parts
            ]
        if self.objects is not None:
            text = last["text"] + self.answers[0]
        elif self.box is not None:  # the answer's markup includes the `<box>` that the prompt ends in
            text = last["text"].removesuffix("<box>") + self.answers[0]
        else:  # the most frequent answer, the first one of equals, as in training
            text = f"{last['text']} {Counter(self.answers).most_common(1)[0][0]}"
        return [*parts, {**last, "text": text}]


def fill_images(messages: Sequence[Message], images: Sequence[Any]) -> list[Message]:
    """The messages, in parts, with the images in their places in order."""
    sources = iter(images)

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": next(sources)} if part["type"] == "image" else part

    return [{**message, "content": [filled(part) for part in message["content"]]} for message in messages]
