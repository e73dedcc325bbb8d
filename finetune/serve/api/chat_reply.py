"""Replies in the form of OpenAI's API: a whole one, and the pieces of one that is streamed."""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.replies.running_batch import NewToken, TokenLogprob
from finetune.serve.asked import Usage
from finetune.serve.pixel_boxes import PixelBox

LEAST_LOGPROB = -9999.0  # what OpenAI's API gives for tokens that cannot be: JSON has no infinity


@dataclass
class _Choice:
    """What there is of one reply."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class ChatReply:
    """The replies to one request, while they grow.

    Args:
        model: the name that was asked.
        n: how many replies.
        token_bytes: the bytes of a token.
        with_logprobs: whether the log-probabilities of tokens are wanted.
        boxes: the boxes of a reply's text; None where they are not wanted.
        with_usage: whether a stream ends with the counts of tokens.
    """

    def __init__(
        self,
        model: str,
        n: int,
        token_bytes: Callable[[int], bytes],
        *,
        with_logprobs: bool = False,
        boxes: Callable[[str], Sequence[PixelBox]] | None = None,
        with_usage: bool = False,
    ) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._choices = [_Choice() for _ in range(n)]
        self._token_bytes, self._with_logprobs, self._boxes = token_bytes, with_logprobs, boxes
        self._with_usage = with_usage

    # --- as a whole

    def add(self, choice: int, token: NewToken) -> None:
        """A reply has grown."""
        own = self._choices[choice]
        own.texts.append(token.text)
        own.finish = token.finish
        if self._with_logprobs:
            own.logprobs += self._logprobs(token)

    def whole(self, usage: Usage) -> dict[str, Any]:
        """The answer, once all replies have ended."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": own.text, "refusal": None, **self._boxes_of(own)},
                "logprobs": {"content": own.logprobs, "refusal": None} if self._with_logprobs else None,
                "finish_reason": own.finish,
            }
            for index, own in enumerate(self._choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage_json(usage)}

    # --- in pieces

    def first_pieces(self) -> list[bytes]:
        """What a stream begins with."""
        return [
            self._piece(index, {"role": "assistant", "content": "", "refusal": None})
            for index in range(len(self._choices))
        ]

    def pieces(self, choice: int, token: NewToken) -> list[bytes]:
        """What a token adds to a stream: nothing, while it may still become part of a stop text or of a character."""
        self.add(choice, token)
        own = self._choices[choice]
        logprobs = {"content": self._logprobs(token), "refusal": None} if self._with_logprobs else None
        pieces = []
        if token.text or (logprobs is not None and logprobs["content"]):
            pieces.append(self._piece(choice, {"content": token.text}, logprobs))
        if token.finish is not None:
            pieces.append(self._piece(choice, self._boxes_of(own), finish=token.finish))
        if self._boxes is None:
            own.texts.clear()  # nobody asks for them again
        own.logprobs.clear()
        return pieces

    def last_pieces(self, usage: Usage) -> list[bytes]:
        """What a stream ends with."""
        end = [b"data: [DONE]\n\n"]
        if not self._with_usage:
            return end
        whole = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_json(usage)}
        return [event(whole), *end]

    def _piece(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        whole = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return event({**whole, "usage": None} if self._with_usage else whole)

    def _boxes_of(self, choice: _Choice) -> dict[str, Any]:
        if self._boxes is None:
            return {}
        boxes = [
            {"label": box.label, "box": box.box, "quad": box.quad, "image": box.image}
            for box in self._boxes(choice.text)
        ]
        return {"boxes": boxes}

    def _logprobs(self, token: NewToken) -> list[dict[str, Any]]:
        if token.id is None or token.logprob is None:
            return []
        top = [self._logprob(one) for one in token.top_logprobs]
        return [{**self._logprob(token.logprob), "top_logprobs": top}]

    def _logprob(self, token: TokenLogprob) -> dict[str, Any]:
        written = self._token_bytes(token.id)
        return {
            "token": written.decode(errors="replace"),
            "logprob": max(token.logprob, LEAST_LOGPROB),
            "bytes": list(written),
        }


def usage_json(usage: Usage) -> dict[str, Any]:
    """Counts of tokens."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
