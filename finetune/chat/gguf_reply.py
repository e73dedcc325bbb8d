"""A reply of a GGUF model in a conversation, token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from finetune.replies.decoder import PromptRow
from finetune.replies.gguf_model import GgufModel
from finetune.replies.running_batch import NewToken, ReplyRequest, RunningBatch
from finetune.replies.sampling import Sampling


@dataclass(frozen=True)
class GgufReply:
    """A reply.

    Attributes:
        ids: its tokens.
        ended: whether the model ended it.
        stopped: whether Ctrl-C stopped it.
    """

    ids: tuple[int, ...]
    ended: bool
    stopped: bool


def gguf_reply(
    model: GgufModel,
    ids: Sequence[int],
    features: Sequence[torch.Tensor],
    *,
    image_keys: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    on_text: Callable[[str], None],
) -> GgufReply:
    """Reply to a prompt; what earlier turns have of it is not computed again.

    Args:
        model: with no other replies in it.
        ids: tokens of the prompt.
        features: (n_queries, hidden) of each image, in reading order.
        image_keys: one for each image; equal keys mean equal features.
        max_new_tokens: most tokens.
        temperature: 0 always takes the likeliest token.
        on_text: called with the pieces of the reply, in whole characters.

    Raises:
        UserError: the prompt fills the context.
    """
    batch = RunningBatch(model.decoder, model.tokenizer)
    prompt = PromptRow(ids, features, image_keys)
    request = ReplyRequest(prompt, max_new_tokens, model.stop_ids, sampling=Sampling(temperature=temperature))
    found: list[int] = []
    last: NewToken | None = None
    numbers: list[int] = []
    try:
        numbers, new = batch.join([request])
        while new:
            (last,) = new
            if last.id is not None:
                found.append(last.id)
            if last.text:
                on_text(last.text)
            new = batch.step()
    except KeyboardInterrupt:
        return GgufReply(tuple(found), ended=False, stopped=True)
    finally:
        batch.leave(numbers)
    return GgufReply(tuple(found), ended=last is not None and last.finish == "stop", stopped=False)
