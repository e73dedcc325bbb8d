"""How a source's rows become conversations: its format, columns, prompt and box form."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.data.formats import caption, document_fields, grounding, llava, messages, qwen_json, swift, texts, vqa
from finetune.data.formats.document_fields import WantedFields
from finetune.data.formats.grounding import NO_OBJECT, ImageSize
from finetune.data.formats.messages import Message
from finetune.data.formats.pixel_boxes import BoxForm
from finetune.data.formats.unread import unread_names
from finetune.data.sample import DataError

# Each format is the module of its name; these are its settings that a recipe can name.
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": messages.COLUMNS,
    "qwen_json": qwen_json.COLUMNS,
    "llava": llava.COLUMNS,
    "swift": swift.COLUMNS,
    "texts": texts.COLUMNS,
    "vqa": vqa.COLUMNS,
    "grounding": grounding.COLUMNS,
    "caption": caption.COLUMNS,
    "fields": document_fields.COLUMNS,
}
PROMPTS: dict[str, str] = {
    "vqa": vqa.PLACEHOLDER,
    "grounding": grounding.DEFAULT_PROMPT,
    "caption": caption.DEFAULT_PROMPT,
}
LATER_COLUMNS: dict[str, tuple[str, ...]] = {
    "grounding": grounding.LATER_COLUMNS,
    **dict.fromkeys(("messages", "qwen_json", "llava"), ("system",)),
}
"""Columns that formats got after there were runs: with their own names they are in no fingerprint."""
PLACEHOLDERS = {"vqa": vqa.PLACEHOLDER}
"""What a prompt must hold. That of `grounding` may hold {phrase}, see there."""


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one source become conversations.

    Attributes:
        name: the format.
        columns: the format's column -> the data's name for it; a column that is not listed has the format's name.
        prompt: the user's text, for `vqa` (with {question}), `grounding` (with {phrase}, or without it to ask for all
            objects) and `caption`; None for the format's default.
        box_form: of `grounding`: "xyxy" or "xywh", pixels; None is "xyxy".
        no_object: of `grounding`: the reply where a row has no box.
        wanted: of `fields`: which fields, and how they are asked for. Each is a column as well.
        ignore: columns (and keys of turns, as `messages.name`) that are not read, as if the rows did not have them.
        text_places: whether `<image>` in a user's text may be the place of an image (`messages`, `swift`, `texts`).

    Raises:
        DataError: an unknown format, column or box form, or a prompt that lacks its placeholder or has no use.
    """

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    box_form: BoxForm | None = None
    no_object: str = NO_OBJECT
    wanted: WantedFields | None = None
    ignore: frozenset[str] = frozenset()
    text_places: bool = True

    def __post_init__(self) -> None:
        if self.name not in COLUMNS:
            raise DataError(f"format must be one of {', '.join(COLUMNS)}, not {self.name!r}")
        if (self.name == "fields") != (self.wanted is not None):
            raise DataError("format fields, and no other, says which fields are read")
        roles = (*COLUMNS[self.name], *(self.wanted.names if self.wanted is not None else ()))
        unknown = set(self.columns or ()) - set(roles)
        if unknown:
            raise DataError(
                f"columns of format {self.name} are {', '.join(roles)}, not "
                f"{', '.join(sorted(unknown))}: write the format's column first, then the name it has in the data"
            )
        columns = {name: name for name in roles} | dict(self.columns or {})
        object.__setattr__(self, "columns", columns)
        if self.prompt is not None:
            if self.name not in PROMPTS:
                raise DataError(f"format {self.name} has no prompt: its rows hold what the user says")
            placeholder = PLACEHOLDERS.get(self.name, "")
            if placeholder not in self.prompt or not self.prompt.strip():
                raise DataError(f"the prompt of format {self.name} must hold {placeholder or 'text'}: {self.prompt!r}")
        if self.box_form not in (None, "xyxy", "xywh"):
            raise DataError(f"box_form must be xyxy or xywh, not {self.box_form!r}")

    @property
    def known_columns(self) -> dict[str, str]:
        """The columns for a fingerprint: those that a format got later only where they have another name, so that
        data has the fingerprint that it had before."""
        later = LATER_COLUMNS.get(self.name, ())
        return {role: name for role, name in sorted(self.columns.items()) if role not in later or role != name}

    @property
    def counts_rows(self) -> bool:
        """Whether a row may be several samples, so that all rows are read to count them."""
        return self.counted_column is not None or (self.wanted is not None and self.wanted.reply == "value")

    @property
    def counted_column(self) -> str | None:
        """The column whose length is the number of a row's samples; None where no column is counted."""
        counted = {"vqa": "question", "grounding": "phrase", "caption": "caption"}.get(self.name)
        return None if counted is None else self.columns[counted]

    @property
    def reads_image_size(self) -> bool:
        """Whether the image must be opened for its size."""
        return self.name in ("grounding", "swift")

    def unread(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The columns of a row, and keys of its turns, that hold something and are not read (see `unread`).

        Raises:
            BadField: one that would change training, and that is not ignored.
        """
        return unread_names(row, self.name, self.columns, self.ignore)

    def conversations(self, row: Mapping[str, Any], image_size: ImageSize, number: int = 0) -> list[list[Message]]:
        """The conversations of a row, at least one. Image sources are as in the row.

        Args:
            row: column -> value.
            image_size: reads an image's size, for boxes in pixels.
            number: of the row; draws the phrasing of `fields`.

        Raises:
            BadField: the row does not fit the format.
        """
        prompt = self.prompt or PROMPTS.get(self.name, "")
        if not self.ignore.isdisjoint(row):
            row = {column: value for column, value in row.items() if column not in self.ignore}
        match self.name:
            case "messages":
                return messages.messages(row, self.columns, text_places=self.text_places)
            case "qwen_json":
                return qwen_json.qwen_json(row, self.columns)
            case "llava":
                return llava.llava(row, self.columns)
            case "swift":
                return swift.swift(row, self.columns, image_size, text_places=self.text_places)
            case "texts":
                return texts.texts(row, self.columns, text_places=self.text_places)
            case "vqa":
                return vqa.vqa(row, self.columns, prompt)
            case "grounding":
                form = self.box_form or "xyxy"
                return grounding.grounding(row, self.columns, image_size, form, prompt, self.no_object)
            case "caption":
                return caption.caption(row, self.columns, prompt)
            case "fields":
                assert self.wanted is not None, "the constructor refuses format fields without it"
                return document_fields.document_fields(row, self.columns, self.wanted, number)
        raise AssertionError(self.name)

    def count(self, row: Mapping[str, Any]) -> int:
        """The number of samples the row makes; 1 for a row that makes none, which is then reported once."""
        if self.name == "grounding":
            return grounding.count_samples(row, self.columns)
        if self.wanted is not None:
            return document_fields.count(row, self.columns, self.wanted)
        column = self.counted_column
        value = None if column is None else row.get(column)
        return max(len(value), 1) if isinstance(value, list | tuple) else 1
