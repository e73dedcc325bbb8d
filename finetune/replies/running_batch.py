"""A batch of replies that grow together; prompts join it and replies leave it between two tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.replies.decoder import Decoder, PromptRow
from finetune.replies.sampling import GREEDY, Sampling
from qwenvl import QwenVLTokenizer


@dataclass(frozen=True)
class ReplyRequest:
    """A reply that is wanted.

    Attributes:
        prompt: what it is to.
        max_new_tokens: its most tokens.
        stop_ids: tokens that end it.
        stop_texts: texts that end it and are not part of it.
        sampling: how its tokens are chosen.
        min_new_tokens: fewest tokens; the stop ids are not generated before.
        choices: tokens, the likeliest of which is the first; empty where it may be any.
    """

    prompt: PromptRow
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    min_new_tokens: int = 0
    choices: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """A token, and the natural logarithm of its probability (of the model's own distribution, before temperature)."""

    id: int
    logprob: float


@dataclass(frozen=True)
class NewToken:
    """What one step added to a reply.

    Attributes:
        reply: its number.
        id: the token; None where the reply ended by one of its `stop_ids`.
        text: whole characters that are now certain to be part of the reply's text: what may become a stop text, or is
            part of a character, comes with a later token.
        finish: why the reply ended, and left the batch: a stop token or text, or its most tokens; None if it goes on.
        logprob, top_logprobs: where `sampling.logprobs` asks for them.
    """

    reply: int
    id: int | None
    text: str
    finish: Literal["stop", "length"] | None = None
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class RunningBatch:
    """Replies that grow by one token a step.

    Args:
        decoder: computes logits.
        tokenizer: of the model.
    """

    def __init__(self, decoder: Decoder, tokenizer: QwenVLTokenizer) -> None:
        self._decoder, self._tokenizer = decoder, tokenizer

    def join(self, requests: Sequence[ReplyRequest]) -> tuple[list[int], list[NewToken]]:
        """Add replies, each of which has its first token then.

        Returns:
            Their numbers, and their first tokens.
        """
        raise NotImplementedError

    def step(self) -> list[NewToken]:
        """The next token of each reply; none, where there are no replies."""
        raise NotImplementedError

    def leave(self, replies: Sequence[int]) -> None:
        """End replies that nobody wants any more."""
        raise NotImplementedError
