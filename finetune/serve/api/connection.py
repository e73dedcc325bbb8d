"""A connection that is cut where its client holds it and does nothing."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE = 20.0
"""Seconds for a request to begin, once its connection is open or its first byte has come."""

UNREAD = 60.0
"""Seconds in which a client reads nothing of what waits for it."""


class Connection(H11Protocol):
    """HTTP/1.1 as uvicorn has it, with an end for clients that send no request, or read no answer."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._after(IDLE, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.flow.write_paused:
                self._keep()  # a request has begun
        elif self._timer is None:
            self._after(IDLE, self.transport.abort)  # the next one begins, or what comes belongs to none

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep()
        super().connection_lost(exc)

    def _watch_reader(self, before: int | None = None) -> None:
        """Cut the connection once nothing of what waits was read for a while."""
        waits = self.transport.get_write_buffer_size()
        if before is not None and waits >= before:
            self.transport.abort()
        elif waits:
            self._after(UNREAD, lambda: self._watch_reader(waits))
        else:
            self._keep()

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._keep()
        self._timer = self.loop.call_later(seconds, act)

    def _keep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
