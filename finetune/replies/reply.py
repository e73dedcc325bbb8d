"""A prompt, how it is to be replied to, and the reply."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.batches.budget import REPLY_BATCH_ROWS, REPLY_BATCH_TOKENS
from qwenvl import ImageAccess


@dataclass(frozen=True)
class Prompt:
    """A prompt to reply to.

    Attributes:
        ids: token ids as `qwenvl.text.chat` renders them, up to where the reply begins.
        images: image sources, in reading order.
        access: which files and URLs these may reach.
        name: of the prompt in errors: file and row.
        choices: tokens, the likeliest of which is the reply's first; empty where it may be any.
    """

    ids: Sequence[int]
    images: Sequence[Any]
    access: ImageAccess
    name: str
    choices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reply:
    """The reply to one prompt.

    Attributes:
        index: of the prompt.
        ids: new tokens, without the one that ends the reply, with those that spell a stop text.
        text: their text with grounding tags, up to the stop text.
        unreadable: why an image of the prompt cannot be read; nothing was generated then. None if all can be read.
        cut: whether it ended because it had the most new tokens, so that the model may have gone on.
    """

    index: int
    ids: tuple[int, ...] = ()
    text: str = ""
    unreadable: str | None = None
    cut: bool = False


@dataclass(frozen=True)
class Decoding:
    """How replies are generated.

    Attributes:
        max_new_tokens: most tokens of a reply.
        stop_ids: tokens that end a reply (`stop_ids_of`).
        stop_texts: texts that end a reply and are not part of it.
        batch_tokens: most tokens of a batch, padding and new tokens included; a longer prompt gets its own batch. It
            is halved when a batch does not fit into the device's memory.
        batch_rows: most rows of a batch.
        min_new_tokens: fewest tokens of a reply; the stop ids are not generated before.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    batch_tokens: int = REPLY_BATCH_TOKENS
    batch_rows: int = REPLY_BATCH_ROWS
    min_new_tokens: int = 0
