"""Models that reply with what a test says, in place of real ones behind the demo's page."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.demo.asked_model import Message
from finetune.replies.running_batch import NewToken
from finetune.replies.task_replies import Style
from finetune.serve.asked import ChoiceToken, Ended, Event, Refused, Usage
from qwenvl.views import Views


class ScriptedTicket:
    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class ScriptedModel:
    """Replies in pieces of a few characters, one reply after the other.

    Attributes:
        replies: an exception is raised by `ask`, `Refused` is sent.
        pause: seconds between two pieces.
        asked: what was asked: messages, most new tokens and temperature.
        tickets: of all that was asked.
    """

    replies: Sequence[str | Refused | Exception]
    title: str = "scripted"
    about: tuple[str, ...] = ("It says what the test tells it to.",)
    template: str | None = None
    style: Style = "chat"
    views: Views | None = None
    takes_images: bool = True
    markup_is_text: bool = False
    trained_length: int = 2048
    pause: float = 0.0
    asked: list[tuple[list[Message], int, float]] = field(default_factory=list)
    tickets: list[ScriptedTicket] = field(default_factory=list)

    def ask(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        on_event: Callable[[Event], None],
    ) -> ScriptedTicket:
        reply: Any = self.replies[len(self.asked) % len(self.replies)]
        self.asked.append((list(messages), max_new_tokens, temperature))
        if isinstance(reply, Exception):
            raise reply
        ticket = ScriptedTicket()
        self.tickets.append(ticket)
        threading.Thread(target=self._reply, args=(reply, ticket, max_new_tokens, on_event), daemon=True).start()
        return ticket

    def _reply(
        self, reply: str | Refused, ticket: ScriptedTicket, most: int, on_event: Callable[[Event], None]
    ) -> None:
        if isinstance(reply, Refused):
            on_event(reply)
            return
        pieces = [reply[start : start + 4] for start in range(0, len(reply), 4)]
        for number, piece in enumerate(pieces[:most], start=1):
            if ticket.cancelled.wait(self.pause):
                return
            finish = "length" if number == most and number < len(pieces) else None
            on_event(ChoiceToken(0, NewToken(0, number, piece, finish)))
        if len(pieces) <= most:
            on_event(ChoiceToken(0, NewToken(0, None, "", "stop")))
        on_event(Ended(Usage(10, len(pieces), 0)))
