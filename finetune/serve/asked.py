"""What is asked of the engine, and what it answers with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.batches.image_request import ImageRequest
from finetune.replies.running_batch import NewToken
from finetune.replies.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class Asked:
    """Replies that are wanted to one prompt.

    Attributes:
        ids: tokens of the prompt; an image is `<img>`, n_queries x `<imgpad>`, `</img>`.
        max_new_tokens: most tokens of a reply.
        stop_ids: tokens that end a reply.
        images: the pictures of the prompt, in reading order. Sources are best given as bytes: a path or URL counts as
            the same image as long as it is written the same.
        adapter: name of the adapter that computes the replies.
        n: how many replies. Reply k, from 0, is drawn as `sampling.nth(k)` says.
        stop_texts: texts that end a reply and are not part of it, wherever they begin.
        sampling: how tokens are chosen.
        deadline: `time.monotonic()` by which all replies have ended; None for none.
    """

    ids: Sequence[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    images: Sequence[ImageRequest] = ()
    adapter: str | None = None
    n: int = 1
    stop_texts: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    deadline: float | None = None


@dataclass(frozen=True)
class ChoiceToken:
    """A reply grew by a token, or ended: `token.finish` says why.

    Attributes:
        choice: which of the n replies, from 0.
        token: what was added.
    """

    choice: int
    token: NewToken


@dataclass(frozen=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt: of the prompt, once, however many replies there are.
        completion: of all replies.
        cached: of the prompt's, those that were not computed again.
    """

    prompt: int
    completion: int
    cached: int


@dataclass(frozen=True)
class Ended:
    """All replies have ended. The last event."""

    usage: Usage


Cause = Literal["input", "memory", "timeout", "closing", "fault", "upstream", "unreachable"]


@dataclass(frozen=True)
class Refused:
    """There will be no more of the replies. The last event.

    Attributes:
        cause: what was asked is wrong (an image that cannot be read, say); the prompt and its reply do not fit into
            memory; the deadline has passed; the engine is closing; a fault of ours, which is logged; or another server
            that computes the replies has failed, or cannot be reached now.
        message: for whoever asked.
    """

    cause: Cause
    message: str


REFUSALS: dict[Cause, str] = {
    "memory": "the device's memory does not hold the prompt and its reply: ask for fewer tokens, images or replies",
    "timeout": "the time allowed for the request has passed",
    "closing": "the server is stopping",
    "fault": "a fault of the server, which is in its log",
    "upstream": "the server that computes the replies has failed",
    "unreachable": "the server that computes the replies cannot be reached",
}
"""What is said, where there is no more to say."""

Event = ChoiceToken | Ended | Refused


class QueueFull(Exception):
    """As many requests wait as may."""


class EngineClosed(Exception):
    """The engine takes no more requests: it is closing, or its thread has failed."""
