"""The process that reads PDFs for another one (`pdf_process`): a program, which imports no more than it needs.

    python pdf_worker.py

On its input and output are requests and replies, each a line of JSON and then bytes. It ends with its input.
"""

import importlib
import json
import math
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any, BinaryIO

BYTES_PER_PIXEL = 16
"""As it is drawn, as RGB, and as it is sent."""


def _without_the_package() -> None:
    """Let `qwenvl.images.pdf_pages` be imported without `qwenvl/__init__.py`, which takes seconds for PyTorch."""
    package = types.ModuleType("qwenvl")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["qwenvl"] = package


def _bound_memory(most: int) -> None:
    """More than this is an error in the library, which ends the process: better than taking that of the machine."""
    if sys.platform == "linux":  # others have no such bound, or do not keep to it
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _bound_time(seconds: float) -> None:
    """End this process after this time; 0 is never. The one that asks does so too, but may have ended itself."""
    if sys.platform != "win32":
        signal.alarm(math.ceil(seconds))


def _answered(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    pdf_pages = importlib.import_module("qwenvl.images.pdf_pages")
    limits = importlib.import_module("qwenvl.images.pixel_limits")
    unusable = importlib.import_module("qwenvl.images.unusable_image").UnusableImage

    def check_size(size: tuple[int, int]) -> None:
        # The page was parsed; what comes now is pixels.
        limits.check_pixels(size, request["max_pixels"])
        _bound_memory(request["memory"] + BYTES_PER_PIXEL * size[0] * size[1])

    _bound_memory(request["memory"])
    try:
        if request["dpi"] is None:
            return {"pages": pdf_pages.count_pdf_pages(data)}, b""
        image = pdf_pages.render_pdf_page(
            data,
            request["page"],
            dpi=request["dpi"],
            check_size=check_size,
            seconds=request["seconds"],
        )
    except unusable as error:
        return {"reason": error.reason, "remedy": error.remedy}, b""
    except MemoryError:
        return {"lost": True}, b""
    return {"size": image.size}, image.tobytes()


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests to the last."""
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["bytes"])
        _bound_time(request["ends_in"])
        reply, pixels = _answered(request, data)
        _bound_time(0)
        replies.write(json.dumps({**reply, "bytes": len(pixels)}).encode() + b"\n" + pixels)
        replies.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the process that asks
    _without_the_package()
    # What a library prints would be taken for a reply.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    serve(sys.stdin.buffer, replies)
