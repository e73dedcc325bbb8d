"""Format `messages`: conversations as in TRL and OpenAI's API, with their images inside or beside them.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the total?"}]},
                  {"role": "assistant", "content": "$ 12.40"}], "images": ["receipt.jpg"]}

Places (`{"type": "image"}` without a source) are filled from `images` in order. If no message has a place, and the
first user message is plain text, the images are put before that text, as in TRL. `prompt` and `completion`, text or
messages, may be given instead of `messages`.

Of a message, its role, content and `grounding` are kept; of a part, its text or image, `grounding` and `numbered`.
What would change the meaning and does not exist in Qwen-VL's format (tool calls, untrained messages) is an error.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.sample import BadField
from qwenvl.text.chat import IMAGE_SOURCE_KEYS, ROLES

COLUMNS = ("messages", "images", "prompt", "completion")
_NO_MEANING = ("tool_calls", "function_call", "tool_call_id")

Message = dict[str, Any]


def messages(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[list[Message]]:
    """The one conversation of a row.

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
    _fill(conversation, fields.images(row, columns["images"]), columns["images"])
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
    for key in _NO_MEANING:
        if message.get(key):
            raise BadField(f"{name}.{key}", "Qwen-VL's format has no tool calls")
    if message.get("weight") not in (None, 1):
        raise BadField(f"{name}.weight", "every assistant's turn is trained; messages have no weight here")
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
    return {"role": role, "content": content, **_flags(message, name, "grounding")}


def _part(part: Mapping[str, Any], role: str, name: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadField(f"{name}.text", f"must be text, not {type(part.get('text')).__name__}")
        return {"type": "text", "text": part["text"], **_flags(part, name, "grounding")}
    if kind not in ("image", "image_url"):
        raise BadField(f"{name}.type", f"must be text or image, not {kind!r}"[:200])
    if role != "user":
        raise BadField(name, "only a user's message can hold images")
    flags = _flags(part, name, "numbered")
    given = [key for key in IMAGE_SOURCE_KEYS if part.get(key) is not None]
    if len(given) > 1:
        raise BadField(name, f"names more than one image ({', '.join(given)})")
    if not given:
        # Some public data sets number the places; `_fill` checks that the numbers follow their order.
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
        roles = [message["role"] for message in conversation[start:]]
        if column == "prompt" and "assistant" in roles:
            # All assistant turns are trained, and a prompt is meant not to be.
            raise BadField(name, "holds an assistant's turn, which would be trained too: use `messages` for that")
        if column == "completion" and roles[0] != "assistant":
            raise BadField(name, "must begin with the assistant's turn")
    return conversation


def _fill(conversation: list[Message], images: list[Any], name: str) -> None:
    """Put the images into their places."""
    parts = [part for message in conversation if isinstance(message["content"], list) for part in message["content"]]
    places = [part for part in parts if part["type"] == "image" and "image" not in part]
    first_user = next((message for message in conversation if message["role"] == "user"), None)
    if images and not places and first_user and isinstance(first_user["content"], str):
        places = [{"type": "image"} for _ in images]
        first_user["content"] = [*places, {"type": "text", "text": first_user["content"]}]
    if len(places) != len(images):
        raise BadField(name, f"has {len(images)} image(s) for {len(places)} place(s) in the messages")
    for number, (place, source) in enumerate(zip(places, images, strict=True)):
        if place.pop("index", number) != number:
            raise BadField(name, "the places in the messages name the images in another order than theirs")
        place["image"] = source
