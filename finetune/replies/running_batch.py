"""A batch of replies that grow together; prompts join it and replies leave it between two tokens."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from finetune.errors import UserError
from finetune.replies.decoder import Decoder, PromptRow
from finetune.replies.sampling import GREEDY, Sampling, choose
from finetune.replies.text_stream import TextStream, TokenBytes
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
        stops_in_lead: whether a stop text may begin in white space at the beginning, see `TextStream`.
    """

    prompt: PromptRow
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    min_new_tokens: int = 0
    choices: tuple[int, ...] = ()
    stops_in_lead: bool = False


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

    A call that raises leaves the other replies as they were: after a failed `step` it may be tried again, with fewer
    replies where memory was short.

    Args:
        decoder: computes logits.
        tokenizer: of the model.
    """

    def __init__(self, decoder: Decoder, tokenizer: QwenVLTokenizer) -> None:
        self._decoder = decoder
        self._token_bytes = TokenBytes(tokenizer)
        self._replies: dict[int, _Reply] = {}
        self._computed: _Computed | None = None  # of a step whose tokens could not be chosen: the decoder is past it

    def __len__(self) -> int:
        """How many replies are growing."""
        return len(self._replies)

    def join(self, requests: Sequence[ReplyRequest]) -> tuple[list[int], list[NewToken]]:
        """Add replies, each of which has its first token then.

        Returns:
            Their numbers, which are never used twice, and their first tokens, in the same order.

        Raises:
            UserError: a prompt is empty, or fills the model's context; none of the replies is added.
        """
        if not all(request.prompt.ids for request in requests):
            raise UserError("the prompt is empty: there is nothing that a reply could go on from")
        rooms = [self._decoder.context - len(request.prompt.ids) for request in requests]
        for request, room in zip(requests, rooms, strict=True):
            if room < 1:
                raise UserError(
                    f"the prompt has {len(request.prompt.ids):,} tokens, and the model takes "
                    f"{self._decoder.context:,} with its reply: shorten it"
                )
        numbers, logits = self._decoder.join([request.prompt for request in requests])
        new = {
            number: _Reply(
                request,
                min(room, request.max_new_tokens),
                TextStream(self._token_bytes, request.stop_texts, stops_in_lead=request.stops_in_lead),
                random.Random(request.sampling.seed),
            )
            for number, request, room in zip(numbers, requests, rooms, strict=True)
        }
        self._replies |= new
        try:
            return numbers, self._grow(new, self._choose(new, logits))
        except BaseException:
            self.leave(numbers)
            raise

    @property
    def reused(self) -> Sequence[int]:
        """Of the replies that joined last, in their order: how many tokens of each prompt were known before."""
        return self._decoder.reused

    def drop_kept(self) -> bool:
        """Give up what is kept of replies that have ended, where memory is short; whether there was any."""
        return self._decoder.drop_kept()

    def step(self) -> list[NewToken]:
        """The next token of each reply; none, where there are no replies.

        After a failure in choosing tokens the step is not computed again, and replies that have joined since have
        their turn in the next one.
        """
        if not self._replies:
            return []
        if self._computed is None or not self._replies.keys() & self._computed.replies:
            logits = self._decoder.step({number: reply.last for number, reply in self._replies.items()})
            self._computed = _Computed(list(self._replies), logits)
        numbers, logits = self._computed.replies, self._computed.logits
        replies = {number: self._replies[number] for number in numbers if number in self._replies}
        if len(replies) < len(numbers):
            logits = logits[[row for row, number in enumerate(numbers) if number in replies]]
        chosen = self._choose(replies, logits)
        self._computed = None
        return self._grow(replies, chosen)

    def leave(self, replies: Sequence[int]) -> None:
        """End replies that nobody wants any more; those that have ended already do not matter."""
        live = [number for number in dict.fromkeys(replies) if number in self._replies]
        for number in live:
            del self._replies[number]
        if live:
            self._decoder.leave(live)

    def _choose(self, replies: "dict[int, _Reply]", logits: torch.Tensor) -> "list[_Chosen]":
        """Choose the replies' tokens from (replies, vocabulary) logits. Where that fails nothing has changed."""
        samplings = [reply.request.sampling for reply in replies.values()]
        draws = [reply.draws for reply in replies.values()]
        states = [
            (own, own.getstate()) for own, sampling in zip(draws, samplings, strict=True) if sampling.temperature > 0
        ]
        try:
            tokens = choose(_allowed(list(replies.values()), logits), samplings, draws)
            logprobs = _logprobs(logits, samplings, tokens)
        except BaseException:
            for own, state in states:
                own.setstate(state)
            raise
        return [(token, *logprobs.get(row, (None, ()))) for row, token in enumerate(tokens)]

    def _grow(self, replies: "dict[int, _Reply]", chosen: "Sequence[_Chosen]") -> list[NewToken]:
        """Add the tokens to the replies; those that end leave."""
        new = [reply.take(number, *one) for (number, reply), one in zip(replies.items(), chosen, strict=True)]
        self.leave([one.reply for one in new if one.finish is not None])
        return new


_Chosen = tuple[int, TokenLogprob | None, tuple[TokenLogprob, ...]]
"""A token, and what `NewToken` has of log-probabilities."""


@dataclass(frozen=True)
class _Computed:
    """What the decoder has computed: the replies' numbers, and (replies, vocabulary) logits."""

    replies: list[int]
    logits: torch.Tensor


@dataclass
class _Reply:
    """A growing reply.

    Attributes:
        most: its most tokens.
        count: tokens so far.
        last: the latest of them.
    """

    request: ReplyRequest
    most: int
    text: TextStream
    draws: random.Random
    count: int = 0
    last: int = field(default=-1)

    def take(
        self, number: int, token: int, logprob: TokenLogprob | None, top_logprobs: tuple[TokenLogprob, ...]
    ) -> NewToken:
        """Add a token; what came of it."""
        if token in self.request.stop_ids:
            return NewToken(number, None, self.text.end(), "stop", logprob, top_logprobs)
        self.last = token
        self.count += 1
        text = self.text.add(token)
        finish: Literal["stop", "length"] | None = "stop" if self.text.stopped else None
        if finish is None and self.count == self.most:
            text += self.text.end()
            finish = "stop" if self.text.stopped else "length"
        return NewToken(number, token, text, finish, logprob, top_logprobs)


def _allowed(replies: Sequence[_Reply], logits: torch.Tensor) -> torch.Tensor:
    """The logits, -inf for tokens that may not be the next: all but the choices, or the stop ids of a short reply."""
    allowed = logits
    for row, reply in enumerate(replies):
        chosen_from = reply.request.choices if reply.count == 0 else ()
        too_short = reply.request.stop_ids if reply.count < reply.request.min_new_tokens else ()
        if (chosen_from or too_short) and allowed is logits:
            allowed = logits.clone()
        if chosen_from:
            places = list(chosen_from)
            allowed[row] = -torch.inf
            allowed[row, places] = logits[row, places]
        if too_short:
            allowed[row, list(too_short)] = -torch.inf
    return allowed


def _logprobs(
    logits: torch.Tensor, samplings: Sequence[Sampling], tokens: Sequence[int]
) -> dict[int, tuple[TokenLogprob, tuple[TokenLogprob, ...]]]:
    """By row: the token's log-probability, and those of the likeliest tokens; of the rows that ask for them."""
    found = {}
    for row, (sampling, token) in enumerate(zip(samplings, tokens, strict=True)):
        if sampling.logprobs is not None:
            logprobs = logits[row].float().log_softmax(-1)
            values, ids = logprobs.topk(sampling.logprobs)
            top = tuple(map(TokenLogprob, ids.tolist(), values.tolist()))
            found[row] = (TokenLogprob(token, float(logprobs[token])), top)
    return found
