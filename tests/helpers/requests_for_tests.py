"""Messages as clients of OpenAI's API send them."""

import base64
from pathlib import Path
from typing import Any

from encoded_images import encode
from PIL import Image


def data_uri(image: bytes | Image.Image | str | Path, mime: str = "image/png") -> str:
    """An image as a data URI: encoded bytes, pixels, or a file."""
    if isinstance(image, Image.Image):
        image = encode(image)
    elif isinstance(image, str | Path):
        image = Path(image).read_bytes()
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


def image_part(image: bytes | Image.Image | str | Path, mime: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(image, mime)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    """A user's message: one text, or parts."""
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}
