"""What the API takes, and from whom."""

from dataclasses import dataclass
from pathlib import Path

from qwenvl import ImageAccess

MAX_BODY = 32_000_000
MAX_PIXELS = 40_000_000
"""A page of A4 at 600 dots an inch has 35 million."""

SENT_IMAGES = ImageAccess(max_pixels=MAX_PIXELS, max_bytes=MAX_BODY)


@dataclass(frozen=True)
class ApiSettings:
    """Limits and defaults of the API.

    Attributes:
        max_model_len: most tokens of a prompt and its reply together.
        images: whether URLs are fetched, and the limits of an image.
        max_images: most images of a request.
        max_body: most bytes of a request.
        timeout: seconds for a request, from its arrival to its last token.
        temperature: of requests that give none.
        keys: one of them must come with each request; empty where none is needed.
        hosts: what a request may call this server (its Host header); None is anything.
        cors: origins whose pages may use the API in a browser.
        adapter_folders: where adapters are loaded from at run time; empty where none are loaded or dropped then.
    """

    max_model_len: int
    images: ImageAccess = SENT_IMAGES
    max_images: int = 16
    max_body: int = MAX_BODY
    timeout: float = 600.0
    temperature: float = 0.0
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    cors: tuple[str, ...] = ()
    adapter_folders: tuple[Path, ...] = ()
