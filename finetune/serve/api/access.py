"""Who may ask: the key of a request, the name that it calls this server, and the type of what it sends."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from finetune.serve.api.errors import ApiError

OPEN_PATHS = ("/health",)
"""Answered without a key."""


class Access:
    """Refuses requests before anything of their bodies is read.

    Args:
        app: what is asked then.
        keys: one of them must be in `Authorization: Bearer ...`; empty where none is needed.
        hosts: names without ports that a request's Host may have; None for any. A page of the web whose own name leads
            to this machine (DNS rebinding) is kept out by it.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], hosts: Sequence[str] | None) -> None:
        self._app, self._hosts = app, hosts
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._hosts is not None and host_name(headers.get(b"host", b"").decode("latin-1")) not in self._hosts:
            raise ApiError(
                403, f"this server is called {' or '.join(self._hosts)}, and not as the Host header says", code="host"
            )
        if self._keys and scope["path"] not in OPEN_PATHS and not self._is_known(headers.get(b"authorization", b"")):
            raise ApiError(
                401,
                "this server needs a key that it knows, as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] == "POST":
            # A page of the web may send other types to any server without being asked first.
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ApiError(415, "the request must have Content-Type: application/json", code="content_type")

    def _is_known(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        # All are compared, each in a time that says nothing of how much is right.
        equal = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(equal)


def host_name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower().rstrip(".")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
