"""Format `messages`: conversations as in TRL and OpenAI's API, with their images inside or beside them.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the total?"}]},
                  {"role": "assistant", "content": "$ 12.40"}], "images": ["receipt.jpg"]}

Places (`{"type": "image"}` without a source) are filled from `images` in order. If no message has one, each `<image>`
in the users' texts is a place, as LLaMA-Factory and ms-swift write them. If there is none either, and the first user
message is plain text, the images are put before that text, as in TRL. `prompt` and `completion`, text or messages, may
be given instead of `messages`; the column `system` instead of a first message.

Of a message, its role, content, `grounding` and whether it is trained (see `turn_loss`) are kept; of a part, its text
or image, `grounding` and `numbered`. What else is in a row is found by `unread`.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.formats.places import PLACE, split_places
from finetune.data.formats.system import put_system_first
from finetune.data.formats.turn_loss import train_flag
from finetune.data.sample import BadField
from qwenvl.text.chat import ROLES
from qwenvl.text.image_parts import IMAGE_SOURCE_KEYS

COLUMNS = ("messages", "images", "prompt", "completion", "system")

Message = dict[str, Any]


def messages(row: Mapping[str, Any], columns: Mapping[str, str], *, text_places: bool = True) -> list[list[Message]]:
    """The one conversation of a row.

    Args:
        text_places: whether `<image>` in a user's text may be the place of an image; False leaves it as text.

    Raises:
        BadField: a row that is not as above, an assistant's turn without text, or images and places that differ in
            number.
    """
    if row.get(columns["messages"]) is None and row.get(columns["prompt"]) is not None:
        conversation = _prompt_completion(row, columns)
    else:
        name = columns["messages"]
        given = fields.mappings(fields.field(row, name), name)
        conversation = [read_message(message, f"{name}[{index}]", index) for index, message in enumerate(given)]
    put_system_first(conversation, row, columns["system"])
    fill_images(conversation, fields.images(row, columns["images"]), columns["images"], text_places=text_places)
    return [conversation]


def read_message(message: Mapping[str, Any], name: str, index: int) -> Message:
    """Convert one message to the form that `render_chat` reads, without keys whose value is None.

    Raises:
        BadField: a role, content or part that Qwen-VL's format does not have.
    """
    role = message.get("role")
    if role not in ROLES:
        raise BadField(f"{name}.role", f"must be one of {', '.join(ROLES)}, not {role!r}"[:200])
    if role == "system" and index:
        raise BadField(f"{name}.role", "a system message can only be the first")
    content = message.get("content")
    if content is None:
        raise BadField(f"{name}.content", "is missing")
    if not isinstance(content, str):
        content = [
            _part(part, role, f"{name}.content[{place}]")
            for place, part in enumerate(fields.mappings(content, f"{name}.content"))
        ]
    if role == "assistant":
        written = content if isinstance(content, str) else "".join(part["text"] for part in content)
        fields.text(written, f"{name}.content")
    flags = {**_flags(message, name, "grounding"), **train_flag(message, role, name)}
    return {"role": role, "content": content, **flags}


def _part(part: Mapping[str, Any], role: str, name: str) -> dict[str, Any]:
    kind = part.get("type")
    given = [key for key in IMAGE_SOURCE_KEYS if part.get(key) is not None]
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadField(f"{name}.text", f"must be text, not {type(part.get('text')).__name__}")
        if given:
            raise BadField(f"{name}.{given[0]}", "is an image in a part of type text: give it a part of type image")
        return {"type": "text", "text": part["text"], **_flags(part, name, "grounding")}
    if kind not in ("image", "image_url"):
        raise BadField(f"{name}.type", f"must be text or image, not {kind!r}"[:200])
    if role != "user":
        raise BadField(name, "only a user's message can hold images")
    if part.get("text"):
        raise BadField(f"{name}.text", "is a text in a part of type image: give it a part of type text")
    flags = _flags(part, name, "numbered")
    if len(given) > 1:
        raise BadField(name, f"names more than one image ({', '.join(given)})")
    if not given:
        # Some public data sets number the places; `fill_images` checks that the numbers follow their order.
        index = part.get("index")
        return {"type": "image", **flags} if index is None else {"type": "image", "index": index, **flags}
    source = part[given[0]]
    if given[0] == "image_url" and isinstance(source, Mapping):
        source = source.get("url")
    return {"type": "image", "image": fields.image(source, f"{name}.{given[0]}"), **flags}


def _flags(given: Mapping[str, Any], name: str, flag: str) -> dict[str, bool]:
    value = given.get(flag)
    if value is None:
        return {}
    if not isinstance(value, bool):
        raise BadField(f"{name}.{flag}", f"must be true or false, not {value!r}"[:200])
    return {flag: value}


def _prompt_completion(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    conversation: list[Message] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        name = columns[column]
        value = fields.field(row, name)
        if isinstance(value, str):
            value = [{"role": role, "content": fields.text(value, name)}]
        start = len(conversation)
        for index, message in enumerate(fields.mappings(value, name)):
            conversation.append(read_message(message, f"{name}[{index}]", start + index))
        if column == "prompt":
            # What is given is not trained.
            for message in conversation:
                if message["role"] == "assistant":
                    message["train"] = False
        if column == "completion" and conversation[start]["role"] != "assistant":
            raise BadField(name, "must begin with the assistant's turn")
    return conversation


def fill_images(conversation: list[Message], images: list[Any], name: str, *, text_places: bool = True) -> None:
    """Put the images into their places.

    Args:
        conversation: is changed; its messages are not of the row.
        images: sources; `name`, of their column.
        text_places: whether `<image>` in a user's text may be a place.

    Raises:
        BadField: images and places differ in number or order.
    """
    places = _places(conversation)
    users = [message for message in conversation if message["role"] == "user"]
    if images and not places and text_places and any(_has_place(message) for message in users):
        for message in users:
            message["content"] = _split_content(message["content"])
        places = _places(conversation)
    if images and not places and users and isinstance(users[0]["content"], str):
        places = [{"type": "image"} for _ in images]
        users[0]["content"] = [*places, {"type": "text", "text": users[0]["content"]}]
    if len(places) != len(images):
        raise BadField(name, f"has {len(images)} image(s) for {len(places)} place(s) in the messages")
    for number, (place, source) in enumerate(zip(places, images, strict=True)):
        if place.pop("index", number) != number:
            raise BadField(name, "the places in the messages name the images in another order than theirs")
        place["image"] = source


def _places(conversation: list[Message]) -> list[dict[str, Any]]:
    parts = [part for message in conversation if isinstance(message["content"], list) for part in message["content"]]
    return [part for part in parts if part["type"] == "image" and "image" not in part]


def _has_place(message: Message) -> bool:
    content = message["content"]
    if isinstance(content, str):
        return PLACE in content
    return any(part["type"] == "text" and PLACE in part["text"] for part in content)


def _split_content(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The content with each `<image>` of its texts as a part."""
    if isinstance(content, str):
        return split_places(content) if PLACE in content else content
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text" and PLACE in part["text"]:
            flags = {key: value for key, value in part.items() if key == "grounding"}
            parts += [{**piece, **(flags if piece["type"] == "text" else {})} for piece in split_places(part["text"])]
        else:
            parts.append(part)
    return parts
