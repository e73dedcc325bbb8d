"""A vLLM server, asked over HTTP."""

import json
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import torch

from finetune.errors import UserError
from finetune.export.qwen2_prompt_embeddings import encoded_for_server
from finetune.serve.vllm_completions import Piece, StreamError, error_message, read_event

CONNECTING = 10.0
SILENCE = 600.0
"""Seconds to wait for a connection, and for the next token; a request's own deadline is mostly sooner."""

PART = 1 << 18
"""Bytes of a request that are sent together."""

SAME_LOGPROB = 0.05
"""How far the logarithms of a probability may be apart that are computed from ids and from their embeddings."""


class ServerFailed(Exception):
    """The server has not answered as it should.

    Attributes:
        cause: "unreachable", where asking again may help; "upstream" for any other.
        message: what happened and what to do.
    """

    def __init__(self, cause: Literal["unreachable", "upstream"], message: str):
        super().__init__(message)
        self.cause, self.message = cause, message


@dataclass(frozen=True)
class ServedThere:
    """What a server says of its model.

    Attributes:
        name: what it is called in requests.
        context: most tokens of a prompt and its reply; None if it does not say.
    """

    name: str
    context: int | None


class VllmServer:
    """A vLLM server that takes prompt embeddings.

    Args:
        url: its address, with or without `/v1`.
        key: its API key; None where it has none.

    Raises:
        UserError: not an address.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"--at {url}: that is no address of a server; give one such as http://localhost:8000")
        if parts.username or parts.password:
            raise UserError("--at has a user or password in it; give the server's key by --at-key-file")
        self.url = url.rstrip("/").removesuffix("/v1")
        # Neither a proxy nor a password from the environment: the server is a machine of one's own.
        self._settings: dict[str, Any] = {
            "base_url": f"{self.url}/v1/",
            "headers": {} if key is None else {"Authorization": f"Bearer {key}"},
            "timeout": httpx.Timeout(SILENCE, connect=CONNECTING),
            "trust_env": False,
        }

    def what_is_served(self) -> ServedThere:
        """Ask for its models.

        Raises:
            ServerFailed: it does not answer, or not as vLLM does.
        """
        answer = self._ask("GET", "models")
        try:
            own = [one for one in answer["data"] if one.get("parent") is None]
            return ServedThere(own[0]["id"], own[0].get("max_model_len"))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ServerFailed("upstream", f"{self.url} does not list its models as vLLM does") from error

    def check_embeddings(self, model: str, ids: list[int], embeddings: torch.Tensor) -> None:
        """Ask for the token after the same prompt as ids and as embeddings: it must be as likely.

        Args:
            ids: of any prompt.
            embeddings: (length, hidden) of these ids.

        Raises:
            ServerFailed: it does not answer.
            UserError: it takes no embeddings, or those of its model are others.
        """
        asked = {"model": model, "max_tokens": 1, "temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True}
        found = []
        for prompt in ({"prompt_embeds": encoded_for_server(embeddings)}, {"prompt": ids}):
            answer = self._ask("POST", "completions", asked | prompt)
            try:
                given = answer["choices"][0]["logprobs"]
                found.append((given["tokens"][0], given["token_logprobs"][0]))
            except (KeyError, TypeError, IndexError) as error:
                raise ServerFailed("upstream", f"{self.url} does not complete prompts as vLLM does") from error
        (token, logprob), (token_of_ids, logprob_of_ids) = found
        if abs(logprob - logprob_of_ids) > SAME_LOGPROB:
            raise UserError(
                f"--at {self.url}: it continues a prompt by {token} ({logprob:.3f}) where it is given embeddings and "
                f"by {token_of_ids} ({logprob_of_ids:.3f}) where it is given the same tokens: {model} is another "
                "model than the folder here; serve that folder there"
            )

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator["Streams"]:
        """Connections for many streams at once; closed with the context."""
        # Idle connections are closed sooner than by the server, or one could close while a request is on its way.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        async with httpx.AsyncClient(**self._settings, limits=limits) as client:
            yield Streams(self.url, client)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            with httpx.Client(**self._settings) as client:
                answer = client.request(method, path, json=body)
                if answer.is_success:
                    return answer.json()
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from error
        except ValueError as error:
            raise ServerFailed("upstream", f"{self.url} does not answer in JSON: it is no vLLM server") from error
        raise _refused(self.url, answer.status_code, answer.text)


class Body:
    """A request in parts, each of which is let go once it is sent: embeddings are long, and replies take a while.

    Args:
        request: `completion_request`.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        content = json.dumps(request).encode()
        self.length = len(content)
        self._parts = deque(content[start : start + PART] for start in range(0, len(content), PART))

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        while self._parts:
            yield self._parts.popleft()


class Streams:
    """Streamed completions of one server."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self._url, self._client = url, client

    async def pieces(self, body: Body) -> AsyncGenerator[Piece]:
        """The reply to a request, as it grows. Closing the iterator ends the work on it there.

        Args:
            body: of the request; it is used up.

        Raises:
            ServerFailed: the server does not answer, refuses the request, or breaks off.
        """
        ended = False
        headers = {"Content-Type": "application/json", "Content-Length": str(body.length)}
        try:
            async with self._client.stream("POST", "completions", content=body, headers=headers) as answer:
                if not answer.is_success:
                    raise _refused(self._url, answer.status_code, (await answer.aread()).decode(errors="replace"))
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == line or data == "[DONE]":
                        continue
                    piece = read_event(data)
                    if piece is not None:
                        ended = ended or piece.finish is not None
                        yield piece
        except StreamError as error:
            raise ServerFailed("upstream", f"the vLLM server failed: {error}; see its log") from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _unreachable(self._url, error) from error
        except httpx.HTTPError as error:
            raise ServerFailed("upstream", f"the vLLM server broke off ({_words(error)}); see its log") from error
        if not ended:
            raise ServerFailed("upstream", "the vLLM server ended the reply without saying why; see its log")


def _unreachable(url: str, error: Exception) -> ServerFailed:
    return ServerFailed(
        "unreachable",
        f"no vLLM server answers at {url} ({_words(error)}): start it with `vllm serve FOLDER "
        "--enable-prompt-embeds`, or wait until it has loaded the model",
    )


def _refused(url: str, status: int, text: str) -> ServerFailed:
    try:
        message = error_message(json.loads(text))
    except ValueError:
        message = text[:200]
    what = f"the vLLM server answers {status}: {message}"
    if status in (401, 403):
        return ServerFailed("upstream", f"{what}. Give its key by --at-key-file")
    if status == 404:
        return ServerFailed("upstream", f"{what}. Is {url} a vLLM server, and its model still the same?")
    return ServerFailed("unreachable" if status in (429, 503) else "upstream", what)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
