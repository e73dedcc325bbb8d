"""The way of a request's events from the engine's thread to the event loop, bounded where nobody reads them."""

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from fastapi import Request

from finetune.serve.asked import Event
from finetune.serve.replier import Cancellable

T = TypeVar("T")

MOST_EVENTS = 1024
"""Events of a streamed reply that wait for a reader. With those of the operating system's buffers these are minutes of
a reply."""


class TooSlow(Exception):
    """The reader of a stream let too many events wait; its request was ended."""


class ClientGone(Exception):
    """The client has closed the connection."""


class Delivery:
    """Hands what other threads post to an event loop, which is woken once for all that has come until it runs: a step
    of the engine posts an event for each reply, and to wake a loop is a call of the operating system.
    """

    def __init__(self) -> None:
        self._posted: deque[tuple[Callable[[Event], None], Event]] = deque()
        self._is_due = False

    def post(self, loop: asyncio.AbstractEventLoop, take: Callable[[Event], None], event: Event) -> None:
        """Have `take(event)` called in the loop, in the order of posting. From any thread."""
        self._posted.append((take, event))
        if not self._is_due:
            self._is_due = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_due = False  # first: what is posted from now on is taken below, or wakes the loop again
        while self._posted:
            take, event = self._posted.popleft()
            take(event)


_deliveries: WeakKeyDictionary[asyncio.AbstractEventLoop, Delivery] = WeakKeyDictionary()
"""Of each loop, its own."""


class Mailbox:
    """Takes the events of one request in any thread, and gives them in the loop that it is made in.

    Args:
        streams: replies that are streamed, whose client may read slowly; 0 where replies are given as a whole: nobody
            can hold these up, and all of their events are kept, however long the loop is busy.

    Attributes:
        ticket: of the request; the request is ended where too many events wait.
    """

    def __init__(self, streams: int = 0) -> None:
        self._most = streams * MOST_EVENTS if streams else sys.maxsize
        self._loop = asyncio.get_running_loop()
        self._delivery = _deliveries.setdefault(self._loop, Delivery())
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._overflowed = False
        self.ticket: Cancellable | None = None

    def put(self, event: Event) -> None:
        """From any thread."""
        self._delivery.post(self._loop, self._put, event)

    async def get(self) -> Event:
        """The next event.

        Raises:
            TooSlow: too many have waited.
        """
        if self._overflowed:
            raise TooSlow
        return await self._events.get()

    def _put(self, event: Event) -> None:
        if self._events.qsize() >= self._most:
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
