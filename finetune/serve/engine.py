"""Public names; what does the work follows."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from finetune.serve.asked import Asked, Event

if TYPE_CHECKING:
    from finetune.serve.opened_model import OpenedModel

T = TypeVar("T")


class Ticket:
    """A request that the engine has taken."""

    def cancel(self) -> None:
        """End it before the next step; no more events come. From any thread, any number of times."""
        raise NotImplementedError


class Engine:
    """Replies to many requests in one running batch.

    One thread of its own, which alone touches the model, takes requests, encodes their images, joins them to the
    batch, steps, and hands out what came of it.
    """

    def __init__(self, model: "OpenedModel", *, max_queue: int = 64) -> None:
        raise NotImplementedError

    def submit(self, asked: Asked, on_event: Callable[[Event], None]) -> Ticket:
        """Ask for replies. From any thread; does not wait.

        Args:
            asked: what is wanted.
            on_event: called in the engine's thread with each event, the last of which is `Ended` or `Refused`. It must
                return at once: while it works no reply grows.

        Raises:
            QueueFull: as many requests wait as may.
            EngineClosed: it takes no more.
        """
        raise NotImplementedError

    def run_between_steps(self, work: Callable[[], T]) -> "Future[T]":
        """Run `work` in the engine's thread between two steps: it may use the model, load an adapter, say.

        Raises:
            EngineClosed: it takes no more.
        """
        raise NotImplementedError

    def close(self, grace: float) -> None:
        """Take no more requests, let those that were taken finish for `grace` seconds, and end the others. Returns
        once the thread has ended."""
        raise NotImplementedError
