"""Image parts of messages: their sources, their numbers, and one image as several pictures."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwenvl.errors import InputError

IMAGE_TYPES = ("image", "image_url")

# Keys under which a part of type image may have its source, in the order of the search.
IMAGE_SOURCE_KEYS = ("image", "path", "url", "image_url")

_OWN_NUMBER = re.compile(r"(?<!\w)Picture (?P<number>\d{1,6}):(?P<space> ?)\Z")


def picture_prefix(number: int) -> str:
    """The text before the `number`-th image of a conversation."""
    return f"Picture {number}:"


def own_number(text: str) -> "re.Match[str] | None":
    """The number that a text ends with, where the writer of a row numbers the image after it: `Picture 1: `."""
    return _OWN_NUMBER.search(text)


def image_source(part: Mapping[str, Any], where: str) -> Any:
    """The source of an image part, not opened; None if it names none (the image is then given beside the messages).

    Raises:
        InputError: more than one source, or `image_url` without a URL.
    """
    given = [key for key in IMAGE_SOURCE_KEYS if part.get(key) is not None]
    if len(given) > 1:
        raise InputError(f"{where}: names more than one image ({', '.join(given)})")
    if not given:
        return None
    source = part[given[0]]
    if given[0] == "image_url" and isinstance(source, Mapping):
        source = source.get("url")
        if source is None:
            raise InputError(f"{where}: image_url has no url")
    return source


def put_pictures(contents: Sequence[Any], pictures: Callable[[Any], Sequence[Any]]) -> list[Any]:
    """Contents of messages in which each image is one picture or several.

    Where a text numbers its image itself (a part with `"numbered": False` after `Picture 1: `, as in the published
    format of rows), it gets the number that the picture has now, and each further picture a line with its own:
    `Picture 1: <img></img>\\nPicture 2: <img></img>`. Pictures of other images without numbers follow one another.

    Args:
        contents: of a conversation's messages, in order; what is no list of parts is left as it is, for
            `chat.read_turns` to say what is wrong.
        pictures: the sources that an image becomes, by its own source; called once for each image, in reading order.

    Raises:
        InputError: an image with more than one source, or a text that gives an image another number than its own.
    """
    images = shown = 0
    put: list[Any] = []
    for index, content in enumerate(contents):
        if isinstance(content, str | Mapping) or not isinstance(content, Sequence):
            put.append(content)
            continue
        parts: list[Any] = []
        for number, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type") not in IMAGE_TYPES:
                parts.append(part)
                continue
            images += 1
            where = f"message {index}, part {number}"
            sources = pictures(image_source(part, where))
            others = {key: value for key, value in part.items() if key not in IMAGE_SOURCE_KEYS}
            own = own_number(parts[-1]["text"]) if _is_text(parts) and part.get("numbered") is False else None
            if own is not None:
                if int(own["number"]) != images:
                    raise InputError(
                        f"{where}: the text before it says Picture {own['number']}, and it is image {images} of the "
                        "conversation: it cannot be numbered anew"
                    )
                parts[-1] = {
                    **parts[-1],
                    "text": f"{own.string[: own.start()]}{picture_prefix(shown + 1)}{own['space']}",
                }
            for place, source in enumerate(sources):
                shown += 1
                if place and own is not None:
                    parts.append({"type": "text", "text": f"\n{picture_prefix(shown)}{own['space']}"})
                parts.append({**others, "type": "image", "image": source})
        put.append(parts)
    return put


def _is_text(parts: Sequence[Any]) -> bool:
    last = parts[-1] if parts else None
    return isinstance(last, Mapping) and last.get("type") == "text" and isinstance(last.get("text"), str)
