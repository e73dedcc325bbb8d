"""A client over HTTP of a few lines, which can also send what is broken, read slowly, or leave."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """Status, and the body of an answer that came whole."""

    status: int
    body: bytes

    @property
    def events(self) -> list[Any]:
        """Of a stream that was ended as it should be."""
        *events, done, empty = self.body.split(b"\n\n")
        assert (done, empty) == (b"data: [DONE]", b""), self.body[-200:]
        return [json.loads(event.removeprefix(b"data: ")) for event in events]

    def texts(self) -> dict[int, str]:
        """Each choice's text, of a stream or not; each has an end."""
        texts: dict[int, str] = {}
        ended = set()
        is_stream = self.body.startswith(b"data: ")
        for read in self.events if is_stream else [json.loads(self.body)]:
            for choice in read["choices"]:
                text = choice["delta" if is_stream else "message"].get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + text
                if choice["finish_reason"] is not None:
                    ended.add(choice["index"])
        assert ended == set(texts), self.body[-200:]
        return texts


class Connection:
    """A connection that is kept for several requests."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self,
        body: bytes,
        *,
        path: str = "/v1/chat/completions",
        kind: str = "application/json",
        length: int | None = None,
        pause: float = 0.0,
        leave_after: int | None = None,
    ) -> Answer | None:
        """Send a request and read its answer.

        Args:
            length: said in the header; None is that of the body.
            pause: seconds before each 300 bytes of the answer.
            leave_after: close the connection after so many bytes of the answer's body; 0 before any. None is returned
                then.
        """
        fresh = self._streams is None
        try:
            return await self._ask(body, path, kind, len(body) if length is None else length, pause, leave_after)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.close()
            if fresh:
                raise
            # The server may close a kept connection while a request is on its way; then it has not begun it.
            return await self._ask(body, path, kind, len(body) if length is None else length, pause, leave_after)

    async def _ask(
        self, body: bytes, path: str, kind: str, length: int, pause: float, leave_after: int | None
    ) -> Answer | None:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
        writer.write(head.encode() + body)
        if leave_after == 0:
            await writer.drain()
            self.close()
            return None
        status = int((await reader.readline()).split()[1])
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        read = b""
        if b"transfer-encoding: chunked" in headers:
            while size := int(await reader.readline(), 16):
                read += (await reader.readexactly(size + 2))[:-2]
                if leave_after is not None and len(read) >= leave_after:
                    self.close()
                    return None
                if pause:
                    await asyncio.sleep(pause)
            await reader.readline()
        else:
            read = await reader.readexactly(int(headers.partition(b"content-length: ")[2].split(b"\r\n")[0]))
        if b"connection: close" in headers or length != len(body):
            self.close()
        return None if leave_after is not None else Answer(status, read)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
