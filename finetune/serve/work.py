"""A request inside the engine: its pictures, its replies and how far they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from finetune.replies.decoder import PromptRow
from finetune.replies.running_batch import NewToken, ReplyRequest
from finetune.serve.asked import Asked, ChoiceToken, Event, Usage
from finetune.serve.picture_reading import Picture

EXPECTED = 256
"""Tokens of a reply that room is kept for; where replies get longer, the last to join may have to begin anew."""


class NotRepeated(Exception):
    """A reply that was begun anew did not repeat what was given out of it."""


@dataclass
class Choice:
    """One of the replies of a request.

    Attributes:
        index: which one, from 0.
        given: tokens that were given out, None for a stop token.
        seen: how many of these it has had since it joined the batch last: fewer while it repeats them.
        ended: whether it is complete.
    """

    index: int
    given: list[int | None] = field(default_factory=list)
    seen: int = 0
    ended: bool = False

    def take(self, token: NewToken) -> ChoiceToken | None:
        """The event of a new token; None where the reply repeats what was given out before.

        Raises:
            NotRepeated: it is another token than was given out.
        """
        self.seen += 1
        if self.seen <= len(self.given):
            if token.id != self.given[self.seen - 1] or token.finish is not None:
                raise NotRepeated
            return None
        self.given.append(token.id)
        self.ended = token.finish is not None
        return ChoiceToken(self.index, token)


@dataclass(eq=False)
class Work:
    """A request, from when it is taken until its last event. Only the engine's thread uses it, `cancelled` aside.

    Attributes:
        asked: what is wanted; its images are let go once they are read.
        on_event: takes the events.
        choices: the replies.
        pictures: of the prompt; None until they are read.
        numbers: of its rows in the batch, by reply, while they are there.
        cached: tokens of the prompt that were not computed again.
        failure: why its pictures cannot be read, or what was a fault in computing it.
        cancelled: whether nobody wants it any more. Set from any thread.
    """

    asked: Asked
    on_event: Callable[[Event], None]
    choices: Sequence[Choice]
    pictures: list[Picture] | None = None
    numbers: dict[int, Choice] = field(default_factory=dict)
    cached: int = 0
    failure: Exception | None = None
    cancelled: bool = False

    @property
    def open_choices(self) -> list[Choice]:
        """Replies that have not ended."""
        return [choice for choice in self.choices if not choice.ended]

    @property
    def missing(self) -> list[Picture]:
        """Pictures that are to be encoded."""
        return [picture for picture in self.pictures or () if picture.features is None]

    @property
    def length(self) -> int:
        """Tokens of its longest row in the batch, the prompt included."""
        return len(self.asked.ids) + max((choice.seen for choice in self.numbers.values()), default=0)

    @property
    def expected_length(self) -> int:
        """Tokens that a row is to have room for when it joins. Replies are mostly far shorter than they may be."""
        had = max(len(choice.given) for choice in self.choices)
        return len(self.asked.ids) + max(had, min(self.asked.max_new_tokens, EXPECTED))

    @property
    def usage(self) -> Usage:
        completion = sum(token is not None for choice in self.choices for token in choice.given)
        return Usage(len(self.asked.ids), completion, self.cached)

    def requests(self) -> list[ReplyRequest]:
        """What the batch is asked for, a request for each open reply."""
        asked, pictures = self.asked, self.pictures or []
        features = [picture.features for picture in pictures if picture.features is not None]
        assert len(features) == len(pictures), "all pictures are encoded"
        prompt = PromptRow(asked.ids, features, [picture.key for picture in pictures], asked.adapter)
        return [
            # A reply that is begun anew draws the same tokens again: the engine gives every request a seed.
            ReplyRequest(
                prompt,
                asked.max_new_tokens,
                asked.stop_ids,
                asked.stop_texts,
                asked.sampling.nth(choice.index),
                stops_in_lead=True,
            )
            for choice in self.open_choices
        ]
