"""Texts that name pictures by number, where `data.pages` or `data.views` gives them other numbers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.message_parts import content_parts
from finetune.data.sample import BadField
from qwenvl.text.image_parts import own_number

_NAMED = re.compile(r"(?<!\w)Picture (?P<number>\d{1,6})(?!\w)")


def refuse_moved_pictures(messages: Sequence[Mapping[str, Any]], fixed: int, key: str) -> None:
    """Check that no text names an image whose number changes: "Picture 2" would be another picture.

    Numbers beyond those of the images are of pictures that the writer knew of, and stay.

    Args:
        messages: before the images became several pictures.
        fixed: images, from the first, whose numbers stay.
        key: of the recipe, that changes them.

    Raises:
        BadField: a text does.
    """
    images = sum(part["type"] == "image" for message in messages for part in content_parts(message))
    if images <= fixed:
        return
    for index, message in enumerate(messages):
        parts = content_parts(message)
        for number, part in enumerate(parts):
            if part["type"] != "text" or "Picture" not in part["text"]:
                continue
            follows = parts[number + 1] if number + 1 < len(parts) else {}
            # The number of the image itself is written anew.
            own = own_number(part["text"]) if follows.get("numbered") is False else None
            text = part["text"] if own is None else part["text"][: own.start()]
            for named in _NAMED.finditer(text):
                if fixed < int(named["number"]) <= images:
                    raise BadField(
                        f"messages[{index}]",
                        f"says {named[0]!r}, and image {named['number']} is another picture with {key}, which makes "
                        f"several of one: take {key} out, or name the image in other words",
                    )
