"""What is asked of a vLLM server and what it answers: its completions API, with prompt embeddings.

Written against vLLM's own source at commit 002032ee2b18e1f7bd924ec47b62504ba3866063 (`CompletionRequest`,
`CompletionStreamResponse` and `CompletionLogProbs` in vllm/entrypoints/openai/completion/protocol.py, and serving.py
beside it); the fields used here are the same at d5dba2d7b0ab9b98096560c69db7126b54b14d79, which is older. vLLM ignores
fields that it does not know, so a wrong name would have no effect and no error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.replies.running_batch import TokenLogprob
from finetune.replies.sampling import GREEDY, Sampling

TOKEN_ID = "token_id:"
"""How vLLM writes a token with `return_tokens_as_token_ids`."""


def completion_request(
    model: str,
    prompt_embeds: str,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling = GREEDY,
) -> dict[str, Any]:
    """The body of a streamed request for one reply.

    Every setting that changes a reply is given: what is left out, vLLM takes from the model's generation_config.json.
    Stop texts are not among them. vLLM would look for them in another text than ours, so whoever asks looks for them
    and closes the stream, which ends the reply there.

    Args:
        model: its name on the server.
        prompt_embeds: (length, hidden) of the prompt, as `encoded_for_server` gives them.
        max_new_tokens: most tokens of the reply.
        stop_ids: tokens that end it, in place of those that the server knows.
        sampling: how tokens are chosen. vLLM draws its own random numbers: a seed repeats a reply there alone.
    """
    only_likeliest = sampling.temperature == 0 or sampling.top_p == 0  # vLLM takes no top_p of 0
    asked: dict[str, Any] = {
        "model": model,
        "prompt_embeds": prompt_embeds,
        "max_tokens": max_new_tokens,
        "temperature": 0.0 if only_likeliest else sampling.temperature,
        "top_p": 1.0 if only_likeliest else sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": list(stop_ids),
        "return_token_ids": True,  # the text is decoded here, so that it is the same as without vLLM
        "stream": True,
    }
    if sampling.seed is not None:
        asked["seed"] = sampling.seed
    if sampling.logprobs is not None:
        asked |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    return asked


@dataclass(frozen=True)
class Piece:
    """What one event of the stream adds to a reply.

    Attributes:
        ids: its new tokens; the last is one of `stop_ids` where that ended the reply.
        logprobs: of each token, where they were asked for.
        top_logprobs: for each token the likeliest ones.
        finish: why the reply ended; None if it goes on.
    """

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...]
    finish: Literal["stop", "length"] | None


class StreamError(Exception):
    """What the server sent is an error, or is not of the form of its API."""


def read_event(data: str) -> Piece | None:
    """What one event says of the reply; None for one without choices.

    Args:
        data: after `data: `; not `[DONE]`.

    Raises:
        StreamError: see there.
    """
    try:
        read = json.loads(data)
        if "error" in read:
            raise StreamError(error_message(read))
        return _piece(read["choices"][0]) if read["choices"] else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StreamError(f"an event that is not of the completions API: {data[:200]}") from error


def _piece(choice: dict[str, Any]) -> Piece:
    finish = choice.get("finish_reason")
    if finish not in (None, "stop", "length"):
        raise StreamError(f"the reply was ended: {finish}")
    ids = tuple(choice.get("token_ids") or ())
    if choice.get("text") and not ids:
        raise StreamError("text without token_ids, which were asked for: this vLLM is too old")
    logprobs: tuple[TokenLogprob, ...] = ()
    top: tuple[tuple[TokenLogprob, ...], ...] = ()
    if (given := choice.get("logprobs")) is not None:
        logprobs = tuple(map(_logprob, given["tokens"], given["token_logprobs"]))
        top = tuple(
            tuple(_logprob(token, value) for token, value in likeliest.items()) for likeliest in given["top_logprobs"]
        )
    return Piece(ids, logprobs, top, finish)


def _logprob(token: str, value: float) -> TokenLogprob:
    return TokenLogprob(int(token.removeprefix(TOKEN_ID)), value)


def error_message(answer: Any) -> str:
    """The message of an error in vLLM's form or an older one, or the answer itself."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = error.get("message") if isinstance(error, dict) else error
    return str(message if message else answer)
