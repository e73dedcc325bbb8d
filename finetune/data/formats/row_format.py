"""How a source's rows become conversations: its format, columns, prompt and box form."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.data.formats import caption, grounding, llava, messages, qwen_json, swift, texts, vqa
from finetune.data.formats.grounding import BoxForm, ImageSize
from finetune.data.formats.messages import Message
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
}
PROMPTS: dict[str, str] = {
    "vqa": vqa.PLACEHOLDER,
    "grounding": grounding.DEFAULT_PROMPT,
    "caption": caption.DEFAULT_PROMPT,
}
PLACEHOLDERS = {"vqa": vqa.PLACEHOLDER, "grounding": grounding.PLACEHOLDER}


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one source become conversations.

    Attributes:
        name: the format.
        columns: the format's column -> the data's name for it; a column that is not listed has the format's name.
        prompt: the user's text, for `vqa` (with {question}), `grounding` (with {phrase}) and `caption`; None for the
            format's default.
        box_form: of `grounding`: "xyxy" or "xywh", pixels; None is "xyxy".
        ignore: columns (and keys of turns, as `messages.name`) that are not read, as if the rows did not have them.
        text_places: whether `<image>` in a user's text may be the place of an image (`messages`, `swift`, `texts`).

    Raises:
        DataError: an unknown format, column or box form, or a prompt that lacks its placeholder or has no use.
    """

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    box_form: BoxForm | None = None
    ignore: frozenset[str] = frozenset()
    text_places: bool = True

    def __post_init__(self) -> None:
        if self.name not in COLUMNS:
            raise DataError(f"format must be one of {', '.join(COLUMNS)}, not {self.name!r}")
        unknown = set(self.columns or ()) - set(COLUMNS[self.name])
        if unknown:
            raise DataError(
                f"columns of format {self.name} are {', '.join(COLUMNS[self.name])}, not "
                f"{', '.join(sorted(unknown))}: write the format's column first, then the name it has in the data"
            )
        columns = {name: name for name in COLUMNS[self.name]} | dict(self.columns or {})
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
    def counted_column(self) -> str | None:
        """The column whose length is the number of a row's samples; None if a row is always one sample."""
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

    def conversations(self, row: Mapping[str, Any], image_size: ImageSize) -> list[list[Message]]:
        """The conversations of a row, at least one. Image sources are as in the row.

        Args:
            row: column -> value.
            image_size: reads an image's size, for boxes in pixels.

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
                return grounding.grounding(row, self.columns, image_size, self.box_form or "xyxy", prompt)
            case "caption":
                return caption.caption(row, self.columns, prompt)
        raise AssertionError(self.name)

    def count(self, row: Mapping[str, Any]) -> int:
        """The number of samples the row makes; 1 for a row that makes none, which is then reported once."""
        column = self.counted_column
        value = None if column is None else row.get(column)
        return max(len(value), 1) if isinstance(value, list | tuple) else 1
