"""What stands before Gradio: its routes that would fetch an address are closed, and the browser is told to load from
this server alone."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.serve.api.access import host_name

POLICY = "; ".join(
    [
        "default-src 'self'",
        # Gradio's page has scripts and styles within it, and compiles templates.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_FILE = "/gradio_api/file="
CLOSED = (
    "/gradio_api/proxy=",
    "/gradio_api/run-history",
    "/gradio_api/process_recording",
    "/gradio_api/deep_link",
    "/gradio_api/vibe",
    "/gradio_api/undo-vibe",
    "/gradio_api/mcp",
    "/monitoring",
)
"""Beginnings of paths that this page does not use."""


class Guard:
    """ASGI middleware around Gradio's app.

    Args:
        app: Gradio's.
        hosts: what requests may call the server, so that no page of the web reaches it under a name of its own; None
            is anything.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None = None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._hosts is not None and _called(scope) not in self._hosts:
            await PlainTextResponse("no such host here", status_code=403, headers=HEADERS)(scope, receive, send)
            return
        path = unquote(scope["path"])
        if path.startswith(CLOSED) or (path.startswith(_FILE) and not path.startswith(f"{_FILE}/")):
            await PlainTextResponse("not found", status_code=404, headers=HEADERS)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                added: list[Any] = [
                    (name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in names
                ]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _called(scope: Scope) -> str:
    """What a request calls the server, without the port."""
    given = next((value for name, value in scope["headers"] if name == b"host"), b"")
    return host_name(given.decode("latin-1"))
