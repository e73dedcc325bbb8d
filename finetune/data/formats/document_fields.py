"""Format `fields`: a row is a document, and each of its fields a column.

    {"image": "invoice.pdf#1", "invoice_no": "A-17", "date": "2026-05-04", "total": "12.40"}

With `reply: value` each field is a question of its own, and a sample; with `reply: json` the reply is one JSON
object of all chosen fields in their order. A field without a value (null, blank, NaN) is left out, or written as null,
as `missing` says. Numbers and booleans become text as JSON writes them; lists and mappings stay JSON, with texts in
them.

Of several phrasings of a prompt, the number of the row draws one, the same in every run; evaluation asks by the first.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.data.formats import fields
from finetune.data.formats.messages import Message
from finetune.data.sample import BadField, DataError
from finetune.recipe.document_fields import (
    DEFAULT_JSON_PROMPT,
    DEFAULT_QUESTION,
    FIELD,
    FIELDS,
    Prompts,
    phrasings,
    problems_of_fields,
)

COLUMNS = ("image",)
DEEPEST = 32
"""Levels of lists and mappings in a value."""
NULL = "null"
"""The answer where a field has no value and `missing` is write_null."""


@dataclass(frozen=True)
class WantedFields:
    """The fields of a source's documents, and how they are asked for.

    Attributes:
        names: in the order of the reply.
        reply: a value for each question, or all as JSON.
        missing: what a field without a value becomes; None is null in JSON, and no question otherwise.
        nested: fields whose text is JSON.
        prompts: what the user says, see `recipe.document_fields`; None is the default.

    Raises:
        DataError: no fields, unknown ones, or prompts that do not fit.
    """

    names: tuple[str, ...]
    reply: Literal["value", "json"] = "value"
    missing: Literal["write_null", "leave_out"] | None = None
    nested: tuple[str, ...] = ()
    prompts: Prompts | None = None

    def __post_init__(self) -> None:
        problems = problems_of_fields(self.names, self.reply, self.nested, self.prompts)
        if problems:
            raise DataError("; ".join(f"{key}: {reason} ({remedy})" for key, reason, remedy in problems))

    @property
    def writes_null(self) -> bool:
        return self.reply == "json" if self.missing is None else self.missing == "write_null"

    def values(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
        """Field -> its value: text, or lists and mappings of texts; None where it has none.

        Raises:
            BadField: a column that the row does not have, or a value that is neither text, number nor JSON.
        """
        values = {}
        for name in self.names:
            column = columns[name]
            if column not in row:
                there = ", ".join(map(str, row))[:200]
                raise BadField(
                    column,
                    f"is missing; the row has {there}. Name the column under `columns`, and give it as null where a "
                    "document has no value",
                )
            values[name] = _value(row[column], column, is_json=name in self.nested)
        return values

    def asked(self, values: Mapping[str, Any]) -> list[str]:
        """The fields that are asked for one by one."""
        return [name for name in self.names if self.writes_null or values[name] is not None]

    def answer(self, value: Any) -> str:
        """The reply to the question for one field."""
        if value is None:
            return NULL
        return value if isinstance(value, str) else self._json(value)

    def json_answer(self, values: Mapping[str, Any]) -> str:
        """The reply with all fields."""
        return self._json({name: values[name] for name in self.names})

    def prompt(self, name: str | None, row: int | None) -> str:
        """What the user says.

        Args:
            name: of the field; None asks for all as JSON.
            row: draws one of the phrasings; None takes the first.
        """
        default = DEFAULT_JSON_PROMPT if name is None else DEFAULT_QUESTION
        texts = phrasings(self.prompts, name or "", default)
        digest = hashlib.sha256(f"{row} {name or ''}".encode()).digest()
        chosen = texts[0 if row is None else int.from_bytes(digest[:8], "big") % len(texts)]
        return chosen.replace(FIELDS, ", ".join(self.names)).replace(FIELD, name or FIELD)

    def _json(self, value: Any) -> str:
        return json.dumps(value if self.writes_null else _without_null(value), ensure_ascii=False)


def document_fields(
    row: Mapping[str, Any], columns: Mapping[str, str], wanted: WantedFields, number: int
) -> list[list[Message]]:
    """One conversation for each field, or one for all.

    Args:
        number: of the row in its source; draws the phrasing.

    Raises:
        BadField: no image, a column or value that cannot be read, or no value in any field.
    """
    images = document_images(row, columns["image"])
    values = wanted.values(row, columns)
    if wanted.reply == "json":
        return [_conversation(images, wanted.prompt(None, number), wanted.json_answer(values))]
    asked = wanted.asked(values)
    if not asked:
        raise BadField("fields", f"none of {', '.join(wanted.names)} has a value, so nothing can be asked")
    return [_conversation(images, wanted.prompt(name, number), wanted.answer(values[name])) for name in asked]


def document_images(row: Mapping[str, Any], column: str) -> list[Any]:
    """The images of a document, at least one.

    Raises:
        BadField: none, or something else.
    """
    fields.field(row, column)
    images = fields.images(row, column)
    if not images:
        raise BadField(column, "holds no image")
    return images


def count(row: Mapping[str, Any], columns: Mapping[str, str], wanted: WantedFields) -> int:
    """The number of samples of a row; 1 for one that makes none, which is then reported once."""
    if wanted.reply == "json":
        return 1
    try:
        return max(len(wanted.asked(wanted.values(row, columns))), 1)
    except BadField:
        return 1


def _conversation(images: list[Any], asked: str, answer: str) -> list[Message]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": asked}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def _value(value: Any, name: str, *, is_json: bool = False, left: int = DEEPEST) -> Any:
    """A value in its plain form; None where there is none."""
    if not left:
        raise BadField(name[:80], f"has more than {DEEPEST} levels")
    match value:
        case None:
            return None
        case str() if not value.strip():
            return None
        case str() if is_json:
            return _parsed(value, name)
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float() if math.isnan(value):  # how pandas writes a missing value
            return None
        case float() if math.isfinite(value):
            return repr(value)
        case Mapping():
            fields.refuse_unknown_text(value, name)
            return {str(key): _value(item, f"{name}.{key}", left=left - 1) for key, item in value.items()}
        case list() | tuple():
            return [_value(item, f"{name}[{place}]", left=left - 1) for place, item in enumerate(value)]
    raise BadField(name, f"must be text, a number, or JSON of these, not {type(value).__name__} {str(value)[:40]}")


def _parsed(text: str, name: str) -> Any:
    try:
        # Numbers as they are written: 12.40 stays 12.40.
        value = json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError) as error:
        raise BadField(name, f"is named under `nested` and is not JSON ({error})") from None
    return _value(value, name)


def _without_null(value: Any) -> Any:
    """Without the keys that have no value, at any depth; an item of a list keeps its place as null."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value
