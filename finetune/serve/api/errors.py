"""Errors in the form of OpenAI's API: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from finetune.serve.asked import Cause, Refused

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}

STATUS_OF_CAUSE: dict[Cause, int] = {
    "input": 400,
    "memory": 503,
    "timeout": 504,
    "closing": 503,
    "fault": 500,
    "upstream": 502,
    "unreachable": 503,
}
"""By the cause of `Refused`."""

GONE = 499
"""What the metrics call a request whose client has left; nobody gets it."""


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for whoever reads it.
        param: the field of the request that is at fault.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, _writable(message), code
        self.param = None if param is None else _writable(param)
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def _writable(text: str) -> str:
    """What a request says may have half a surrogate pair, which no encoding can write."""
    return text.encode(errors="backslashreplace").decode()


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that the client can mend."""
    return ApiError(400, message, param=param, code=code)


def refused(event: Refused) -> ApiError:
    """A request that the engine has ended."""
    # OpenAI's clients try again after a 5xx, which would be of no use.
    headers = {} if event.cause in ("input", "closing", "unreachable") else {"x-should-retry": "false"}
    return ApiError(STATUS_OF_CAUSE[event.cause], event.message, code=event.cause, headers=headers)


def too_many() -> ApiError:
    """As many requests wait as may."""
    return ApiError(
        429,
        "as many requests wait as this server lets wait (--max-queue): try again later",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def closed() -> ApiError:
    """The engine takes no more requests."""
    return ApiError(503, "the server is stopping", code="closing", headers={"Retry-After": "10"})
