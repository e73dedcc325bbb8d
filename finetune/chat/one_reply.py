"""One reply at a time, as a conversation has them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from finetune.replies.decoder import Decoder
from finetune.replies.running_batch import NewToken, ReplyRequest, RunningBatch
from qwenvl import QwenVLTokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class OneReply:
    """A reply.

    Attributes:
        text: with grounding tags, without other control tokens.
        ended: whether the model ended it.
        stopped: whether Ctrl-C stopped it.
    """

    text: str
    ended: bool
    stopped: bool


def one_reply(
    decoder: Decoder, tokenizer: QwenVLTokenizer, request: ReplyRequest, on_text: Callable[[str], None]
) -> OneReply:
    """Reply to a prompt; what the decoder keeps of earlier turns is not computed again.

    Args:
        decoder: with no other replies in it.
        tokenizer: of the model.
        request: what is wanted.
        on_text: called with the pieces of the reply, in whole characters.

    Raises:
        UserError: the prompt fills the context.
        torch.OutOfMemoryError: the device's memory does not hold it, even without what is kept.
    """
    batch = RunningBatch(decoder, tokenizer)
    pieces: list[str] = []
    last: NewToken | None = None
    numbers: list[int] = []
    try:
        numbers, new = _with_memory_given_up(decoder, lambda: batch.join([request]))
        while new:
            (last,) = new
            if last.text:
                pieces.append(last.text)
                on_text(last.text)
            new = _with_memory_given_up(decoder, batch.step)
    except KeyboardInterrupt:
        return OneReply("".join(pieces), ended=False, stopped=True)
    finally:
        batch.leave(numbers)
    return OneReply("".join(pieces), ended=last is not None and last.finish == "stop", stopped=False)


def _with_memory_given_up(decoder: Decoder, work: Callable[[], T]) -> T:
    """Do it; once more where memory was short and the decoder kept something."""
    try:
        return work()
    except torch.OutOfMemoryError:
        if not decoder.drop_kept():
            raise
    return work()
