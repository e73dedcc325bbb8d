"""A digest of a sample's text and image references, by which its row is found again after others were taken out."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from finetune.data.sample import Sample

_ENDS = 4096  # bytes


def row_digest(sample: Sample) -> int:
    """64 bits of a digest of what a sample is made of, never 0.

    Paths count from the root of the images on, so that data may be moved. Nothing is opened. An image inside the row
    counts by its size, of which alone a scan for text knows, and where the whole row is read also by its ends.
    """
    root = f"{sample.access.root}/"
    pieces: list[str] = []
    for message in sample.messages:
        content = message["content"]
        if isinstance(content, str):
            pieces.append(repr(message))
            continue
        pieces.append(repr({key: value for key, value in message.items() if key != "content"}))
        for part in content:
            source = part.get("image")
            if source is None:
                pieces.append(repr(part))
            elif isinstance(source, str):
                pieces.append(source.removeprefix(root))
            else:
                pieces.append(_of_image(source))
    text = "\n".join(pieces).encode(errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") or 1


def _of_image(source: Any) -> str:
    """What tells an image inside a row from another; in place of its bytes, a scan has their number in digits."""
    name, page = "", None
    if isinstance(source, Mapping):
        name, page, source = str(source.get("path")), source.get("page"), source.get("bytes")
    if isinstance(source, bytes) and len(source) > 2 * _ENDS:
        source = b"%d %b %b" % (len(source), source[:_ENDS], source[-_ENDS:])
    content = blake2b(source, digest_size=8).hexdigest() if isinstance(source, bytes) else ""
    return f"{name} {page} {content}"
