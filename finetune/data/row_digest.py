"""A digest of a sample's text and image references, by which its row is found again after others were taken out."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from finetune.data.sample import Sample


def row_digest(sample: Sample) -> tuple[int, bool]:
    """64 bits of a digest of what a sample is made of, never 0; and whether images inside the row were left out of it.

    Paths count from the root of the images on, so that data may be moved. Nothing is opened.
    """
    root = f"{sample.access.root}/"
    pieces: list[str] = []
    embedded = False
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
                embedded = True
                pieces.append(_name(source))
    text = "\n".join(pieces).encode(errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") or 1, embedded


def _name(source: Any) -> str:
    """What is known of an image inside a row: a scan for text does not read its bytes."""
    if not isinstance(source, Mapping):
        return "bytes"
    page = source.get("page")
    return f"{source.get('path')}" if page is None else f"{source.get('path')}#{page}"
