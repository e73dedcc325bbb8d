"""PDFs in a process of their own: a file that takes all memory, hangs or crashes the library ends that process only.

A PDF is a program: a kilobyte of drawing steps that call each other can ask for hundreds of gigabytes, and the
library (pdfium) parses a page as a whole, without a limit or a way to stop it. So a page has a bound in time and in
memory here, and the process that asks stays as it is.

There is one such process for each process that reads PDFs. It starts with the first PDF, in a tenth of a second, and
ends with the process that asks, or when it needs more than it may. A process that is forked starts its own.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO, cast

from PIL import Image

from qwenvl.images import pdf_pages
from qwenvl.images.pdf_pages import LONGEST_SECONDS
from qwenvl.images.unusable_image import UnusableImage

MEMORY = 1 << 30
"""Bytes of address space for all but the file and the pixels of the page. Ordinary pages take a fifth of it."""
_MORE_SECONDS = 5.0  # for what is not drawing


class _Lost(Exception):
    """The process ended, or was ended, before it replied."""


class _PdfProcess:
    """The process, as the one that asks sees it; used by one thread at a time."""

    def __init__(self) -> None:
        # -P: no module beside the program may stand for one of the standard library.
        command = [sys.executable, "-P", str(Path(__file__).with_name("pdf_worker.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._requests = cast(BinaryIO, self._process.stdin)
        self._replies = cast(BinaryIO, self._process.stdout)

    def ask(self, request: dict[str, Any], data: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Its reply, and the bytes after it.

        Raises:
            _Lost: there is none, within so many seconds.
        """
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            self._requests.write(json.dumps({**request, "bytes": len(data), "ends_in": seconds}).encode() + b"\n")
            self._requests.write(data)
            self._requests.flush()
            line = self._replies.readline()
            if not line.endswith(b"\n"):
                raise _Lost
            reply = json.loads(line)
            pixels = self._replies.read(reply["bytes"])
            if len(pixels) < reply["bytes"]:
                raise _Lost
            return reply, pixels
        except OSError as error:  # its end of the pipe is closed
            raise _Lost from error
        finally:
            timer.cancel()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):  # of what was not sent yet
                pipe.close()

    def is_alive(self) -> bool:
        return self._process.poll() is None


class _Asked:
    """The process of this one, and the lock around it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.process: _PdfProcess | None = None

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None

    def after_fork(self) -> None:
        """In the process that was forked: the one that reads PDFs is its parent's."""
        # Nothing is half sent, as no thread holds the lock; so this only closes our copies of the pipes.
        self.process = None
        self.lock.release()


_asked = _Asked()
if sys.platform != "win32":
    # A fork waits until a page that another thread has asked for is there.
    os.register_at_fork(
        before=_asked.lock.acquire, after_in_parent=_asked.lock.release, after_in_child=_asked.after_fork
    )
atexit.register(_asked.close)


def count_pdf_pages(data: bytes) -> int:
    """The number of pages of a PDF.

    Raises:
        UnusableImage: encrypted or damaged, or without pages; or it takes too long or too much memory.
    """
    reply, _ = _ask({"dpi": None}, data, LONGEST_SECONDS, "reading it")
    return int(reply["pages"])


def render_pdf_page(
    data: bytes, page: int | None, *, max_pixels: int, dpi: int = pdf_pages.DPI, seconds: float = LONGEST_SECONDS
) -> Image.Image:
    """Draw a page, as `pdf_pages.render_pdf_page`.

    Args:
        max_pixels: of the page.
        page, dpi, seconds: see there.

    Raises:
        UnusableImage: as there; it has more pixels; or it takes too much memory.
    """
    request = {"page": page, "dpi": dpi, "max_pixels": max_pixels, "seconds": seconds}
    reply, pixels = _ask(request, data, seconds, f"drawing page {page or 1}")
    return Image.frombytes("RGB", tuple(reply["size"]), pixels)


def _ask(request: dict[str, Any], data: bytes, seconds: float, what: str) -> tuple[dict[str, Any], bytes]:
    memory = MEMORY + 2 * len(data)
    with _asked.lock:
        if _asked.process is not None and not _asked.process.is_alive():
            _asked.close()
        try:
            if _asked.process is None:
                _asked.process = _PdfProcess()
        except OSError as error:
            raise UnusableImage(
                f"the process that reads PDFs cannot be started ({error.strerror})", "give the page as an image"
            ) from error
        try:
            reply, pixels = _asked.process.ask({**request, "memory": memory}, data, seconds + _MORE_SECONDS)
        except BaseException as error:
            # Whatever is still on its way is of no use to the next one.
            _asked.close()
            if not isinstance(error, _Lost):
                raise
            reply, pixels = {"lost": True}, b""
    if reply.get("lost"):
        raise UnusableImage(
            f"{what} takes more than {seconds + _MORE_SECONDS:g} s or {memory / 1e9:.1f} GB of memory, or crashes "
            "the library that does it",
            "it is no ordinary page: give it as an image, or drop it from the data",
        )
    if "reason" in reply:
        raise UnusableImage(reply["reason"], reply["remedy"])
    return reply, pixels
