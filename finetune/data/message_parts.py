"""What a conversation's messages hold: images, system message, texts with grounding markup."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwenvl.text.grounding import clamp_to_edge


def content_parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The parts of a message; plain text is one part."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def image_sources(messages: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """The images of a sample's messages, in reading order."""
    for message in messages:
        if not isinstance(message["content"], str):
            yield from (part["image"] for part in message["content"] if part["type"] == "image")


def system_message(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The text of a leading system message; None where there is none, which renders the default one."""
    if messages[0]["role"] != "system":
        return None
    content = messages[0]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def grounding_texts(messages: Sequence[Mapping[str, Any]], everywhere: bool) -> Iterator[tuple[str, str]]:
    """(place, text) of all text that is read as grounding markup."""
    for index, message in enumerate(messages):
        for part in content_parts(message):
            marked = everywhere or message.get("grounding") or part.get("grounding")
            if part["type"] == "text" and marked and "<" in part["text"]:
                yield f"messages[{index}]", part["text"]


def boxes_inside(messages: Sequence[Mapping[str, Any]], everywhere: bool) -> list[Mapping[str, Any]]:
    """The messages with coordinates of 1000 in their boxes as 999.

    Args:
        messages: of a sample.
        everywhere: read all texts as markup, as `data.grounding` does.
    """

    def part_inside(part: Mapping[str, Any], marked: bool) -> Mapping[str, Any]:
        if part["type"] != "text" or not (marked or part.get("grounding")):
            return part
        return {**part, "text": clamp_to_edge(part["text"])}

    inside = []
    for message in messages:
        content, marked = message["content"], everywhere or bool(message.get("grounding"))
        if not isinstance(content, str):
            message = {**message, "content": [part_inside(part, marked) for part in content]}
        elif marked:
            message = {**message, "content": clamp_to_edge(content)}
        inside.append(message)
    return inside
