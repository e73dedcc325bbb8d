"""A request for a chat completion. A field that is not understood is refused by its name, never ignored."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from finetune.serve.api.errors import ApiError, invalid

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
}
"""Fields of OpenAI's that this server does not have, and the values that ask for nothing; null is always one."""


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    # Strict: "5" is no number, 1 no truth value.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Part):
    """Attributes:
    include_usage: whether a last piece has the counts of tokens.
    include_obfuscation: is taken as false: nothing is added to pieces.
    """

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatRequest(_Part):
    """The fields of a request. Those that are None were not given.

    Attributes:
        messages: as `ServedName.render` takes them.
        user, safety_identifier, prompt_cache_key: taken, and without effect.
        boxes: "pixels" gives the boxes of the reply in pixels of the image, beside its text.
    """

    model: str
    messages: list[Any]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Annotated[list[StopText], Field(max_length=4), BeforeValidator(_listed)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    boxes: Literal["pixels"] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of a reply, where it is said."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


def read_chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Check the fields of a request, all but what is in its messages.

    Raises:
        ApiError: an unknown field, or a value that a field does not take.
    """
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
            only = ", ".join(dict.fromkeys(map(json.dumps, neutral)))
            raise invalid(
                f"{name} is not supported by this server: leave it out{f' (or give {only})' if only else ''}",
                name,
                "unsupported_parameter",
            )
    try:
        request = ChatRequest.model_validate({name: value for name, value in body.items() if name not in NEUTRAL})
    except ValidationError as error:
        raise _invalid(error) from None
    if len({request.max_tokens, request.max_completion_tokens} - {None}) > 1:
        raise invalid("max_tokens and max_completion_tokens say different things: give one", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is for requests with stream: true", "stream_options")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs is for requests with logprobs: true", "top_logprobs")
    return request


def _invalid(error: ValidationError) -> ApiError:
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    unknown = [_place(one["loc"]) for one in errors if one["type"] == "extra_forbidden"]
    if unknown:
        fields = ", ".join(ChatRequest.model_fields)
        names = ", ".join(name[:80] for name in unknown[:10])
        return invalid(f"unknown: {names}. The fields are {fields}", unknown[0][:80], "unknown_parameter")
    first = errors[0]
    place = _place(first["loc"])
    return invalid(f"{place}: {first['msg']}", place)


def _place(location: tuple[int | str, ...]) -> str:
    """`stop[1]`"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(".")
