"""The messages of a request, in the form of OpenAI's API, as messages that `qwenvl.text.chat` renders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.batches.image_request import ImageRequest
from finetune.replies.prompt_template import in_prompt
from finetune.serve.image_parts import read_image
from finetune.serve.request_error import RequestError
from qwenvl import ImageAccess
from qwenvl.text.grounding import has_markup

Message = dict[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's roles, and the model's."""

DETAILS = (None, "auto", "low", "high")


@dataclass(frozen=True)
class ReadMessages:
    """Messages of a request.

    Attributes:
        messages: as `render_chat` takes them; the source of each image is an `ImageRequest`.
        images: these, in reading order, each once.
    """

    messages: list[Message]
    images: list[ImageRequest]


def read_messages(
    messages: object,
    *,
    access: ImageAccess,
    most_images: int,
    template: str | None = None,
    images_first: bool = False,
    markup_is_text: bool = False,
) -> ReadMessages:
    """Read the messages of a request; its images are fetched, and not decoded.

    Args:
        messages: `{"role": ..., "content": text or [parts]}`; parts are `{"type": "text", "text": ...}` and
            `{"type": "image_url", "image_url": {"url": ...}}`. Other keys of a message may be null or empty.
        access: as `image_parts.read_image`.
        most_images: in all messages together.
        template: that each message of the user is put into; None for none.
        images_first: put the images of a message before its text, whatever order they are in.
        markup_is_text: well-formed `<ref>`, `<box>` and `<quad>` stay text; otherwise they become tokens.

    Raises:
        RequestError: not such messages, too many images, or one that cannot be had.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages", "must be a list of messages, at least one")
    images: list[ImageRequest] = []
    read: list[Message] = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        role, content = _role_and_content(message, place, index)
        parts = _parts(content, f"{place}.content", role)
        if role == "user":
            parts = _ordered(parts, f"{place}.content", template, images_first)
        count = len(images) + sum(part["type"] == "image" for part in parts)
        if count > most_images:
            raise RequestError(place, f"the request has {count} images, and this server takes {most_images}")
        for part in parts:
            if part["type"] == "image":
                where = part["image"]["place"]
                part["image"] = ImageRequest(read_image(part["image"]["url"], where, access), access, where)
                images.append(part["image"])
        marked = any(part["type"] == "text" and has_markup(part["text"]) for part in parts)
        grounding = role != "system" and marked and not markup_is_text
        read.append({"role": role, "content": parts, **({"grounding": True} if grounding else {})})
    if read[-1]["role"] != "user":
        raise RequestError(f"messages[{len(read) - 1}]", "the last message must be the user's: a reply is to that one")
    return ReadMessages(read, images)


def _role_and_content(message: object, place: str, index: int) -> tuple[str, object]:
    if not isinstance(message, Mapping):
        raise RequestError(place, f"must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{place}.role", f"must be one of {', '.join(ROLES)}, not {role!r}"[:120])
    for key, value in message.items():
        if key not in ("role", "content") and value not in (None, [], {}, ""):
            raise RequestError(f"{place}.{key}", "is not supported: a message has role and content")
    if ROLES[role] == "system" and index:
        raise RequestError(f"{place}.role", f"a {role} message can only be the first, and there can be one")
    return ROLES[role], message.get("content")


def _parts(content: object, place: str, role: str) -> list[dict[str, Any]]:
    """Parts of type text, and of type image with their URL and place."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not content:
        raise RequestError(place, "must be a text, or a list of parts of type text or image_url, at least one")
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        where = f"{place}[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image_url"):
            raise RequestError(where, f"must be a part of type text or image_url, not {kind or part!r}"[:160])
        for key, value in part.items():
            if key not in ("type", kind) and value is not None:
                raise RequestError(f"{where}.{key}", f"is not supported: a part of type {kind} has type and {kind}")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise RequestError(f"{where}.text", "must be a text")
            parts.append({"type": "text", "text": part["text"]})
            continue
        if role != "user":
            raise RequestError(where, f"an image can only be in a user's message, and this is the {role}'s")
        parts.append(
            {"type": "image", "image": {"url": _url(part.get("image_url"), f"{where}.image_url"), "place": where}}
        )
    return parts


def _url(image_url: object, place: str) -> object:
    if not isinstance(image_url, Mapping):
        raise RequestError(place, 'must be an object: {"url": "data:image/png;base64,..."}')
    for key, value in image_url.items():
        if key not in ("url", "detail") and value is not None:
            raise RequestError(f"{place}.{key}", "is not supported: image_url has url and detail")
    if image_url.get("detail") not in DETAILS:
        raise RequestError(f"{place}.detail", f"must be auto, low or high, not {image_url.get('detail')!r}"[:120])
    return image_url.get("url")


def _ordered(
    parts: list[dict[str, Any]], place: str, template: str | None, images_first: bool
) -> list[dict[str, Any]]:
    """A user's parts, in the template and in the order of the prompt."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if template is None and not images_first:
        return parts
    if len(texts) != 1:
        why = f"the prompt {template!r} takes one" if template is not None else "a base model continues one"
        raise RequestError(place, f"the message has {len(texts)} text parts, and {why}: send one")
    return [
        *(part for part in parts if part["type"] == "image"),
        {"type": "text", "text": in_prompt(texts[0], template)},
    ]


def open_markup(messages: Sequence[Message]) -> str:
    """The markup at the end of a prompt that its reply goes on: `<ref>the dog</ref><box>`; mostly empty."""
    text = messages[-1]["content"][-1].get("text", "")
    if not text.endswith("<box>"):
        return ""
    opening = text[max(text.rfind("<ref>"), 0) :]
    return opening if opening.startswith("<ref>") and has_markup(opening) else "<box>"
