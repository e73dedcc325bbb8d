"""The body of a request: counted while it is read, and then JSON that means one thing."""

import asyncio
import json
from typing import Any, NoReturn

from fastapi import Request

from finetune.serve.api.errors import ApiError, invalid

SILENCE = 20.0
"""Seconds in which more of a body must come."""

SLOWEST = 10_000
"""Bytes a second, on the whole, that a body must come with: few are read at once, and others wait for them."""


async def read_body(request: Request, most: int) -> bytearray:
    """The body of a request.

    Raises:
        ApiError: it is longer than `most` bytes, and no more is read then; or its client stopped sending, or sends it
            too slowly.
        ClientDisconnect: the client has left.
    """
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > most:
        raise _too_long(most)
    body = bytearray()
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        async with asyncio.timeout(SILENCE) as limit:
            async for chunk in request.stream():
                body += chunk
                limit.reschedule(min(loop.time(), began + len(body) / SLOWEST) + SILENCE)
                if len(body) > most:
                    raise _too_long(most)
    except TimeoutError:
        headers = {"Connection": "close", "x-should-retry": "false"}
        raise ApiError(
            408,
            f"no more of the request has come for {SILENCE:g} s, or it came with less than {SLOWEST:,} bytes a second",
            headers=headers,
        ) from None
    return body


def read_object(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: it is none, or says something twice.
    """
    try:
        read = json.loads(body, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    except ValueError as error:  # also bytes that are no text
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise invalid("the body must be a JSON object")
    return read


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise ValueError(f"{key!r} is given twice"[:120])
        read[key] = value
    return read


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _too_long(most: int) -> ApiError:
    return ApiError(
        413,
        f"the request has more than {most:,} bytes, which is the most that this server takes (--max-body)",
        code="body_too_large",
    )
