"""The way of a request's events from the engine's thread to the event loop, bounded where nobody reads them."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from finetune.serve.asked import Event
from finetune.serve.replier import Cancellable

T = TypeVar("T")

MOST_EVENTS = 1024
"""Events that wait for a reader. With those of the operating system's buffers these are minutes of a reply."""


class TooSlow(Exception):
    """The reader of a stream let too many events wait; its request was ended."""


class ClientGone(Exception):
    """The client has closed the connection."""


class Mailbox:
    """Takes the events of one request in any thread, and gives them in the loop that it is made in.

    Attributes:
        ticket: of the request; the request is ended where too many events wait.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._overflowed = False
        self.ticket: Cancellable | None = None

    def put(self, event: Event) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._put, event)

    async def get(self) -> Event:
        """The next event.

        Raises:
            TooSlow: too many have waited.
        """
        if self._overflowed:
            raise TooSlow
        return await self._events.get()

    def _put(self, event: Event) -> None:
        if self._events.qsize() >= MOST_EVENTS:
            self._overflowed = True
            self._events = asyncio.Queue()
            if self.ticket is not None:
                self.ticket.cancel()
        elif not self._overflowed:
            self._events.put_nowait(event)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, which is cancelled when the client of a request leaves. The body has been read.

    Raises:
        ClientGone: it has left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
