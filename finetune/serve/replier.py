"""What the API asks for replies: the engine of a model in this process, or a front of one elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from finetune.serve.asked import Asked, Event


@dataclass(frozen=True)
class ReplierState:
    """What is being done, and was done.

    Attributes:
        waiting: requests that are not in the batch.
        rows: replies in the batch.
        row_bound, token_bound: most of the batch; tokens are lower than they were set where memory was short.
        prompt_tokens, cached_tokens, reply_tokens: of all requests that joined the batch; cached ones are of the
            prompts' and were not computed again.
        pictures, pictures_encoded: of all requests that joined the batch, and those that were encoded for it: the
            features of the others were kept.
        set_aside: how often a request was taken out of the batch for want of memory, to be begun anew.
    """

    waiting: int = 0
    rows: int = 0
    row_bound: int = 0
    token_bound: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reply_tokens: int = 0
    pictures: int = 0
    pictures_encoded: int = 0
    set_aside: int = 0


class Cancellable(Protocol):
    """A request that was taken."""

    def cancel(self) -> None:
        """End it soon; no more events come then. From any thread, any number of times."""


class Replier(Protocol):
    """Replies to many requests at once. All of it may be called from any thread, and only `close` waits."""

    def submit(self, asked: Asked, on_event: Callable[[Event], None]) -> Cancellable:
        """Ask for replies; see `finetune.serve.engine.Engine.submit`."""

    def close(self, grace: float) -> None:
        """Take no more requests, let those that were taken finish for `grace` seconds, and end the others. May be
        called again with less time."""

    @property
    def failed(self) -> bool:
        """Whether it has ended by itself, by a fault, and will not reply any more."""

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called."""

    @property
    def is_full(self) -> bool:
        """Whether `submit` would raise `QueueFull`."""

    @property
    def state(self) -> ReplierState:
        """What is being done, and was done."""
