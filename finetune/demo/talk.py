"""What one visitor of the page sees and does: pictures to choose from, and a conversation with each model.

With two models, both answer each message, and each goes on from its own replies.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from finetune.demo.asked_model import AskedModel, Message
from finetune.demo.pictures import (
    MOST_HELD,
    MOST_OFFERED,
    Offered,
    Picture,
    draw,
    offer,
    read_upload,
    take,
)
from finetune.demo.run_examples import Example
from finetune.errors import InputError, UserError
from finetune.replies.prompt_template import PLACEHOLDERS, in_prompt
from finetune.serve.asked import ChoiceToken, Ended, EngineClosed, Event, QueueFull, Refused
from finetune.terminal import terminal_line
from qwenvl.text.grounding import Region, has_markup, parse_grounding

logger = logging.getLogger(__name__)

State = Literal["waiting", "writing", "ended", "cut", "stopped", "failed"]

MOST_IN_MESSAGE = 16
"""Pictures of one message."""


@dataclass(frozen=True)
class Settings:
    """How the visitor wants a message asked.

    Attributes:
        templates: for each model, what the message is put into, in place of {question}; blank for the message itself.
        max_new_tokens: of a reply.
        temperature: 0 always takes the likeliest token.
    """

    templates: tuple[str, ...]
    max_new_tokens: int = 512
    temperature: float = 0.0


@dataclass
class Reply:
    """What one model said to one message.

    Attributes:
        prompt: the message as the model was asked it.
        text: so far, with grounding tags.
        state: "cut" is at the most new tokens.
        problem: why there is none, or no more.
        boxes: what the regions of the text are in pixels, a line each.
        drawn: the picture with the regions on it.
        note: on the regions, where they cannot be drawn.
        length_note: where the conversation is longer than those of the training.
    """

    prompt: str
    text: str = ""
    state: State = "waiting"
    problem: str = ""
    boxes: tuple[str, ...] = ()
    drawn: Path | None = None
    note: str = ""
    length_note: str = ""

    @property
    def is_running(self) -> bool:
        return self.state in ("waiting", "writing")


@dataclass
class Turn:
    """A message and the replies to it, one of each model.

    Attributes:
        example: of the run, where the message is that example unchanged.
    """

    text: str
    pictures: tuple[Picture, ...]
    replies: tuple[Reply, ...]
    example: Example | None = None


@dataclass
class Talk:
    """A visitor's pictures and conversation.

    Attributes:
        models: one, or two that are compared.
        folder: of the small copies that the browser loads; this visitor's alone.
        offered: images and pages to choose from.
        chosen: numbers of those that the next message has, in the order of choice.
        turns: the conversation.
        example: what was filled in last.
    """

    models: Sequence[AskedModel]
    folder: Path
    offered: list[Offered] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    example: Example | None = None
    _example_chosen: list[int] = field(default_factory=list)
    _stop: threading.Event | None = None
    _wake: "SimpleQueue[tuple[int, Event] | None] | None" = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # ---- pictures

    def upload(self, name: str, data: bytes) -> None:
        """Offer an uploaded image, or the pages of a file. An image, or the only page, is chosen at once.

        Raises:
            UserError: it cannot be read, or there is too much already.
        """
        name = terminal_line(name)
        if any(one.upload.data == data for one in self.offered):
            raise UserError(f"{name}: it is here already")
        upload = read_upload(name, data)
        held = {id(one.upload): len(one.upload.data) for one in self.offered}
        if sum(held.values()) + len(data) > MOST_HELD:
            raise UserError(f"{name}: there are too many files already: start a new conversation")
        self._add(offer(upload, self.folder))
        if upload.pages == 1:
            self._choose(len(self.offered) - 1)

    def more_pages(self) -> None:
        """Offer the next pages of the files that have more.

        Raises:
            UserError: one cannot be read, or there are too many already.
        """
        for last in self._with_more():
            assert last.page is not None, "only a file of several pages has more"
            self._add(offer(last.upload, self.folder, last.page + 1), after=self.offered.index(last))

    @property
    def pages_left(self) -> int:
        """Pages of files that are not offered yet."""
        return sum(last.upload.pages - (last.page or 1) for last in self._with_more())

    def toggle(self, number: int) -> None:
        """Choose what is offered under a number, or leave it out.

        Raises:
            UserError: there are too many in the message already.
        """
        if number in self.chosen:
            self.chosen.remove(number)
        elif 0 <= number < len(self.offered):
            self._choose(number)

    def fill_in(self, example: Example) -> None:
        """Put the images of an example into the next message, and nothing else.

        Raises:
            UserError: one cannot be read.
        """
        self.example, self.chosen = None, []
        for path in example.images:
            data = path.read_bytes()
            known = next((number for number, one in enumerate(self.offered) if one.upload.data == data), None)
            if known is None:
                self._add(offer(read_upload(Path(example.origin).name, data), self.folder))
                known = len(self.offered) - 1
            self._choose(known)
        self.example, self._example_chosen = example, list(self.chosen)

    def _choose(self, number: int) -> None:
        if len(self.chosen) >= MOST_IN_MESSAGE:
            raise UserError(f"A message takes {MOST_IN_MESSAGE} pictures at most: leave one out first")
        self.chosen.append(number)

    def _add(self, new: list[Offered], after: int | None = None) -> None:
        if len(self.offered) + len(new) > MOST_OFFERED:
            raise UserError(f"There are {len(self.offered)} pictures already: start a new conversation")
        place = len(self.offered) if after is None else after + 1
        self.offered[place:place] = new
        self.chosen = [number + len(new) if number >= place else number for number in self.chosen]

    def _with_more(self) -> list[Offered]:
        """The last offered page of each file that has more."""
        last = {id(one.upload): one for one in self.offered}
        return [one for one in last.values() if one.page is not None and one.page < one.upload.pages]

    # ---- conversation

    def ask(self, text: str, settings: Settings) -> Iterator[Turn]:
        """Ask the models; yields the turn whenever a reply has grown, and at the end.

        Raises:
            UserError: no text, a template without a place for it, a picture that cannot be read, or a reply is being
                written; then nothing has changed.
        """
        text = text.strip()
        if not text:
            raise UserError("Write a message first")
        for template in settings.templates:
            if template.strip() and not any(placeholder in template for placeholder in PLACEHOLDERS):
                raise UserError("The prompt has no {question}, in place of which the message is put")
        if self.is_running:
            raise UserError("A reply is being written: stop it first")
        pictures = tuple(take(self.offered[number], self.folder) for number in self.chosen)
        templates = [template if template.strip() else None for template in settings.templates]
        turn = Turn(
            text, pictures, tuple(Reply(in_prompt(text, template)) for template in templates), self._asked(text)
        )
        self.turns.append(turn)
        self.example = None
        if self.models[0].style == "chat":  # raw text has no turns: each message needs its picture
            self.chosen = []
        with self._running() as (stop, events):
            yield from self._replies(turn, settings, stop, events)

    def stop(self) -> None:
        """End what is being written; what there is of it stays. From any thread."""
        with self._lock:
            if self._stop is not None and self._wake is not None:
                self._stop.set()
                self._wake.put(None)

    def forget(self) -> None:
        """Start over, without pictures."""
        self.stop()
        self.offered, self.chosen, self.turns, self.example = [], [], [], None
        for file in self.folder.glob("*.jpg"):
            file.unlink(missing_ok=True)

    @property
    def is_running(self) -> bool:
        return self._stop is not None

    def _asked(self, text: str) -> Example | None:
        """The example that a message is, unchanged."""
        is_same = self.example is not None and self.example.question.strip() == text
        return self.example if is_same and self.chosen == self._example_chosen else None

    @contextlib.contextmanager
    def _running(self) -> Iterator[tuple[threading.Event, "SimpleQueue[tuple[int, Event] | None]"]]:
        with self._lock:
            self._stop, self._wake = threading.Event(), SimpleQueue()
        try:
            yield self._stop, self._wake
        finally:
            with self._lock:
                self._stop = self._wake = None

    def _replies(
        self,
        turn: Turn,
        settings: Settings,
        stop: threading.Event,
        events: "SimpleQueue[tuple[int, Event] | None]",
    ) -> Iterator[Turn]:
        tickets = []
        try:
            for number, (model, reply) in enumerate(zip(self.models, turn.replies, strict=True)):
                try:
                    tickets.append(
                        model.ask(
                            self.messages(number),
                            max_new_tokens=settings.max_new_tokens,
                            temperature=settings.temperature,
                            on_event=lambda event, number=number: events.put((number, event)),  # type: ignore[misc]
                        )
                    )
                except QueueFull:
                    reply.state, reply.problem = "failed", "The model is busy: try again in a moment."
                except EngineClosed:
                    reply.state, reply.problem = "failed", "The model is being closed."
                except InputError as error:
                    reply.state, reply.problem = "failed", f"{error}."
            yield turn
            while any(reply.is_running for reply in turn.replies) and not stop.is_set():
                waiting = [events.get()]
                while not events.empty():
                    waiting.append(events.get())
                for item in waiting:
                    if item is not None:
                        _take(turn.replies[item[0]], item[1], self.models[item[0]].trained_length)
                yield turn
        finally:
            for ticket in tickets:
                ticket.cancel()
            for reply in turn.replies:
                if reply.is_running:
                    reply.state = "stopped"
        for number, reply in enumerate(turn.replies):
            self._show_regions(number, turn, reply)
        yield turn

    def messages(self, number: int) -> list[Message]:
        """The conversation with a model so far, up to the message that it has not replied to.

        As in `finetune chat`: a turn without a reply is dropped, and its images stay for the next message.
        """
        model = self.models[number]
        turns = self.turns if model.style == "chat" else self.turns[-1:]
        messages: list[Message] = []
        images: list[Any] = []
        for turn in turns:
            reply = turn.replies[number]
            images += [picture.source for picture in turn.pictures]
            if turn is not turns[-1] and not reply.text.strip():
                continue
            parts = [{"type": "image", "image": source} for source in images]
            content = [*parts, {"type": "text", "text": reply.prompt}] if parts else reply.prompt
            messages.append({"role": "user", "content": content, **self._grounding(model, reply.prompt)})
            images = []
            if turn is not turns[-1]:
                messages.append({"role": "assistant", "content": reply.text, **self._grounding(model, reply.text)})
        return messages

    def _grounding(self, model: AskedModel, text: str) -> dict[str, bool]:
        """The key that turns a message's markup into tokens, if it has any and they are not to be text."""
        return {"grounding": True} if has_markup(text) and not model.markup_is_text else {}

    def _show_regions(self, number: int, turn: Turn, reply: Reply) -> None:
        """Draw boxes and quads of a reply on the last picture that the model was shown."""
        opened = "<box>" if reply.prompt.rstrip().endswith("<box>") else ""  # the reply goes on from it
        regions = parse_grounding(opened + reply.text).regions
        if not regions:
            return
        model = self.models[number]
        turns = [one for one in self.turns if one.pictures] if model.style == "chat" else [turn]
        pictures = [picture for one in turns for picture in one.pictures]
        if not pictures:
            reply.note = "The reply has boxes, but there is no picture in the conversation."
        elif model.views is not None and not model.views.page:
            reply.note = "The reply has boxes, and the model was not shown the whole picture that they would be of."
        else:
            picture = pictures[-1]
            reply.boxes = tuple(_line(region, picture.size) for region in regions)
            try:
                reply.drawn = draw(picture, regions, self.folder)
            except (InputError, OSError) as error:
                logger.warning("the boxes of a reply could not be drawn: %s", error)
                reply.note = "The boxes could not be drawn."


def _take(reply: Reply, event: Event, trained_length: int) -> None:
    """Add an event of the engine to a reply."""
    if isinstance(event, Ended) and event.usage.prompt > trained_length:
        reply.length_note = (
            f"The conversation is {event.usage.prompt:,} tokens long, and the model was trained on up to "
            f"{trained_length:,}: replies may get worse. A new conversation is shorter."
        )
    if not reply.is_running:
        return
    if isinstance(event, ChoiceToken):
        reply.text += event.token.text
        reply.state = "writing"
        if event.token.finish is not None:
            reply.state = "cut" if event.token.finish == "length" else "ended"
    elif isinstance(event, Refused):
        reply.state, reply.problem = "failed", f"{event.message}."
    else:
        reply.state = "ended"


def _line(region: Region, size: tuple[int, int]) -> str:
    """`the dog: (12, 40) (530, 998)`, in pixels."""
    points = " ".join(f"({round(x)}, {round(y)})" for x, y in region.to_pixels(*size).points)
    return f"{region.label if region.label is not None else region.kind}: {points}"
