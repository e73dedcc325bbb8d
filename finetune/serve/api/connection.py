"""A connection that is cut where its client holds it and does nothing."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE = 20.0
"""Seconds for the first request of a connection to begin."""

UNREAD = 60.0
"""Seconds in which a client reads nothing of what was sent, while more waits."""


class Connection(H11Protocol):
    """HTTP/1.1 as uvicorn has it, with an end for clients that send no request, or read no answer."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._cut_after(IDLE)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.flow.write_paused:
                self._keep()  # a request has begun
        elif self._deadline is None:
            self._cut_after(IDLE)  # the next one begins, or what comes belongs to none

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_after(UNREAD)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep()

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep()
        super().connection_lost(exc)

    def _cut_after(self, seconds: float) -> None:
        self._keep()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _keep(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
