"""What a row holds and its format does not read: columns, and keys of its turns and their parts.

Ids and metadata are harmless. What would change training if it were read (images, systems, histories, objects,
weights, tools, videos) is an error; everything else is named, so that the check can say how many rows have it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from finetune.data.formats.turn_loss import LOSS_KEYS
from finetune.data.sample import BadField
from qwenvl.text.image_parts import IMAGE_SOURCE_KEYS

IMAGES = frozenset(
    {
        *("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "image_list", "image_bytes"),
        *(
            "image_path",
            "image_paths",
            "image_file",
            "image_files",
            "image_url",
            "image_urls",
            "img_path",
            "img_paths",
        ),
        "pixel_values",
    }
)
_NAMES_OF_IMAGES = frozenset(name for name in IMAGES if name.endswith(("_path", "_paths", "_file", "_url", "_urls")))
SYSTEMS = frozenset({"system", "systems", "system_prompt", "system_message", "sys_prompt"})
TURNS = frozenset(
    {
        *("history", "histories", "conversations", "conversation", "messages", "dialog", "dialogue", "turns", "texts"),
        "input",
    }
)
TOOLS = frozenset({"tools", "tool_calls", "tool_call_id", "function_call", "functions"})
MEDIA = frozenset({"video", "videos", "audio", "audios"})
LOSSES = LOSS_KEYS | {
    *("weights", "losses", "loss_weight", "loss_weights", "sample_weight"),
    *("assistant_masks", "completion_mask", "loss_mask"),
}
OBJECTS = frozenset({"objects"})
_THOUGHTS = frozenset({"reasoning_content", "thinking"})
_ROW = IMAGES | SYSTEMS | TURNS | TOOLS | MEDIA | LOSSES | OBJECTS
_TURN = IMAGES | TOOLS | MEDIA | LOSSES | OBJECTS | _THOUGHTS
"""Names that would change training, lower case."""

_HARMLESS = frozenset(
    {
        *("id", "ids", "uid", "uuid", "idx", "index", "key", "name", "source", "origin", "dataset", "dataset_name"),
        *("data_source", "file", "filename", "file_name", "url", "license", "author", "authors", "lang", "language"),
        *("split", "data_split", "subset", "tag", "tags", "meta", "metadata", "info", "created", "created_at", "date"),
        *("timestamp", "time", "version", "width", "height", "image_width", "image_height", "image_size", "detail"),
    }
)
_ID = re.compile(r".*(?:_ids?|_idx|_index|_uuid|_hash|_md5|_sha256|[a-z](?:Id|ID|Ids|IDs))")

_CHAT_PART = frozenset({"type", "text", "grounding", "numbered", "index", *IMAGE_SOURCE_KEYS})
_CHAT_TURN = frozenset({"role", "content", "grounding"}) | LOSS_KEYS
_SPOKEN_TURN = frozenset({"from", "value"}) | LOSS_KEYS
_TURN_KEYS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "messages": (("messages", "prompt", "completion"), _CHAT_TURN),
    "swift": (("messages",), _CHAT_TURN),
    "qwen_json": (("conversations",), _SPOKEN_TURN),
    "llava": (("conversations",), _SPOKEN_TURN),
    "texts": (("texts",), frozenset({"user", "assistant"}) | LOSS_KEYS),
}
"""Format -> the columns that hold turns, and the keys of a turn that are read."""

# A column of another name that is read where the format's own is not there.
_OTHER_NAMES = {("llava", "images"): "image", ("vqa", "answer"): "answers"}


def unread_names(
    row: Mapping[str, Any], row_format: str, columns: Mapping[str, str], ignore: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """The columns of a row, and keys of its turns (`messages.name`), that hold something and are not read.

    Args:
        row_format: the format's name.
        columns: the format's column -> the row's, for all that are read.
        ignore: names that are passed over.

    Raises:
        BadField: one that would change training if it were read.
    """
    names: list[str] = []
    for column in _unread_columns(frozenset(row), frozenset(columns.values())):
        value = row[column]
        if column in ignore or _is_empty(value) or _is_other_name(row, row_format, column, columns):
            continue
        if row_format == "qwen_json" and column.lower() in IMAGES and _is_in_text(value, row, columns):
            continue
        if column.lower() in LOSSES and value == 1:
            continue  # what every row is trained with
        # Most columns of a sheet of documents are fields that are not asked for, whatever their names.
        if column.lower() in _ROW and row_format != "fields":
            if (
                column.lower() in _NAMES_OF_IMAGES
                and row.get(columns.get("image") or columns.get("images", "image")) is not None
            ):
                names.append(column)  # the file that the image was
                continue
            raise BadField(column, _refusal(column, row_format, columns, column))
        names.append(column)
    if row_format in _TURN_KEYS:
        roles, known = _TURN_KEYS[row_format]
        for role in roles:
            turns = row.get(columns[role])
            if isinstance(turns, list | tuple):
                for name in _unread_keys(turns, columns[role], known, row_format, columns, ignore):
                    if name not in names:
                        names.append(name)
    # `prompt` beside `messages` is another form of the same conversation, or another conversation.
    if row_format == "messages" and row.get(columns["messages"]) is not None:
        names += [columns[role] for role in ("prompt", "completion") if not _is_empty(row.get(columns[role]))]
    return tuple(names)


def _unread_keys(
    turns: list[Any] | tuple[Any, ...],
    column: str,
    known: frozenset[str],
    row_format: str,
    columns: Mapping[str, str],
    ignore: frozenset[str],
) -> Iterator[str]:
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            continue
        if not turn.keys() <= known:
            yield from _checked_keys(turn, known, column, f"{column}[{index}]", row_format, columns, ignore)
        content = turn.get("content")
        if isinstance(content, list | tuple) and "content" in known:
            for place, part in enumerate(content):
                if isinstance(part, Mapping) and not part.keys() <= _CHAT_PART:
                    name, where = f"{column}.content", f"{column}[{index}].content[{place}]"
                    yield from _checked_keys(part, _CHAT_PART, name, where, row_format, columns, ignore)


def _checked_keys(
    given: Mapping[str, Any],
    known: frozenset[str],
    name: str,
    place: str,
    row_format: str,
    columns: Mapping[str, str],
    ignore: frozenset[str],
) -> Iterator[str]:
    for key in given:
        if key in known or _is_harmless(key) or _is_empty(given[key]) or f"{name}.{key}" in ignore:
            continue
        if key.lower() in _TURN:
            raise BadField(f"{place}.{key}", _refusal(key, row_format, columns, f"{name}.{key}"))
        yield f"{name}.{key}"


@lru_cache(maxsize=1024)
def _unread_columns(given: frozenset[str], read: frozenset[str]) -> tuple[str, ...]:
    """Columns to look at: those of most sources are the same in all rows."""
    return tuple(sorted(column for column in given - read if not _is_harmless(column)))


def _is_harmless(name: str) -> bool:
    return name.lower() in _HARMLESS or _ID.fullmatch(name) is not None


def _is_empty(value: Any) -> bool:
    """Whether a value says nothing; data sets fill columns that other rows have."""
    return value is None or (isinstance(value, str | list | tuple | dict) and (not value or value in ("[]", "{}")))


def _is_other_name(row: Mapping[str, Any], row_format: str, column: str, columns: Mapping[str, str]) -> bool:
    own = _OTHER_NAMES.get((row_format, column))
    return own is not None and columns[own] == own and row.get(own) is None


def _is_in_text(value: Any, row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether the images of a column are named in the conversation too, as `<img>path</img>`."""
    turns = row.get(columns["conversations"])
    if not isinstance(turns, list | tuple):
        return False
    texts = [str(turn.get("value")) for turn in turns if isinstance(turn, Mapping)]
    images = value if isinstance(value, list | tuple) else [value]
    return all(any(f"<img>{image}</img>" in text for text in texts) for image in images)


def _refusal(name: str, row_format: str, columns: Mapping[str, str], ignored: str) -> str:
    lower = name.lower()
    for names, remedy in _REMEDIES:
        if lower in names:
            said = remedy(name, row_format, columns)
            break
    else:
        raise AssertionError(name)
    return (
        f"format {row_format} does not read it, and it would change what is trained: {said}, or have it left out with "
        f"data.ignore: [{ignored}]"
    )


def _images(name: str, row_format: str, columns: Mapping[str, str]) -> str:
    if row_format == "qwen_json":
        return "use format llava, which reads images beside the conversation"
    role = "images" if "images" in columns else "image"
    return f"name it under columns ({role}: {name}) if these are the row's images"


def _system(name: str, row_format: str, columns: Mapping[str, str]) -> str:
    return f"name it under columns (system: {name})" if "system" in columns else "use a format of conversations"


_REMEDIES: tuple[tuple[frozenset[str], Callable[[str, str, Mapping[str, str]], str]], ...] = (
    (IMAGES, _images),
    (SYSTEMS, _system),
    (OBJECTS, lambda *_: "use format swift, which fills them into <ref-object> and <bbox>"),
    (frozenset({"history"}), lambda *_: "use format swift, which reads query, response and history"),
    (frozenset({"input"}), lambda *_: "put its text into the question"),
    (TURNS, lambda *_: "use the format that reads it (messages, qwen_json, llava, swift, texts)"),
    (TOOLS, lambda *_: "Qwen-VL's format has no tool calls"),
    (MEDIA, lambda *_: "Qwen-VL takes images only"),
    (LOSSES, lambda *_: "mark single turns (train: false, or a weight of 0 or 1)"),
    (_THOUGHTS, lambda *_: "put its text into the reply"),
)
