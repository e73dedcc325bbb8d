"""The API on a socket, from the first request to the last reply after a signal."""

import asyncio
import math
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from finetune.errors import Failed, UserError
from finetune.serve.api.connection import Connection
from finetune.serve.replier import Replier

AFTER_GRACE = 5
"""Seconds for answers to be sent after the last reply has ended."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, and does not listen yet, so that a port that is taken is known before weights load.

    Args:
        host: name or address.
        port: 0 picks a free one.

    Raises:
        UserError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be listened on: {error.strerror or error}") from None
    return bound


class Server(uvicorn.Server):
    """Serves an application until a signal comes or its replier fails.

    Args:
        app: the API.
        replier: of it; it is closed when the server stops.
        grace: seconds that running replies have after a signal.
        on_start: called when requests are answered.
    """

    def __init__(
        self, app: FastAPI, replier: Replier, *, grace: float, on_start: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(grace) + AFTER_GRACE,
        )
        super().__init__(config)
        self._replier, self._grace, self._on_start = replier, grace, on_start

    def serve_on(self, bound: socket.socket) -> None:
        """Serve until a signal.

        Raises:
            Failed: the replier has failed.
            Interrupted, KeyboardInterrupt: the signal's, once all has ended.
        """
        self.run([bound])
        if self._replier.failed:
            raise Failed("the device cannot be used any more, by the error above: start the server again")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        return self._replier.failed or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # New connections are refused from now on, and new requests of old ones; replies go on for the grace.
        closing = asyncio.create_task(asyncio.to_thread(self._replier.close, self._grace))
        await super().shutdown(sockets)
        if not closing.done():  # a second Ctrl-C, or clients that do not read
            await asyncio.to_thread(self._replier.close, 0)
        await closing
