"""The sources of a recipe: where rows are, what they look like, and what a source is called."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from finetune.recipe.document_fields import problems_of_fields
from finetune.recipe.problems import nearest
from finetune.recipe.section import Count, Finding, ReadOnlyDict, Section, Word, Words

NAME = re.compile(r"\w[\w.-]*")
"""Of a source: it becomes part of a logged key and of a folder's name."""


class Named(Protocol):
    """A source that has a name: the one it was given, else that of its path."""

    @property
    def path(self) -> str: ...

    @property
    def name(self) -> str | None: ...


def source_name(source: Named) -> str:
    """The name given, or that of the file, folder or hub dataset without folders and ending."""
    if source.name is not None:
        return source.name
    return re.sub(r"[^\w.-]+", "_", Path(source.path).stem).lstrip("_.-") or "data"


def source_names(sources: Sequence[Named]) -> list[str]:
    """The name of each source, in their order; one may come twice, see `name_given_twice`."""
    return [source_name(source) for source in sources]


def name_given_twice(names: Sequence[str]) -> str | None:
    """The first name that several sources share; None where all differ, as they must: scores go by these names."""
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


ROLES = {
    "messages": ("messages", "images", "prompt", "completion", "system"),
    "qwen_json": ("conversations", "system"),
    "llava": ("image", "conversations", "system"),
    "swift": ("query", "response", "history", "system", "images", "objects", "messages"),
    "texts": ("images", "texts", "system"),
    "vqa": ("image", "question", "answers"),
    "grounding": ("image", "phrase", "box", "boxes", "labels"),
    "caption": ("image", "caption"),
    "fields": ("image",),
}
"""The roles that the columns of each format can have; those of `fields` in addition the fields that are named."""

PLACEHOLDERS = {"vqa": "{question}", "grounding": "", "caption": ""}
"""What the prompt of each format must hold; the rows of other formats bring their prompts."""


Layout = Literal["coco", "label_studio", "labelme", "cvat", "via", "yolo"]

LAYOUTS: dict[Layout, tuple[str, ...]] = {
    "coco": ("grounding", "caption"),
    "label_studio": ("grounding", "vqa"),
    "labelme": ("grounding",),
    "cvat": ("grounding",),
    "via": ("grounding",),
    "yolo": ("grounding",),
}
"""Layouts of annotation exports -> the formats that their rows can have."""


def _class_names(value: Any) -> Any:
    """Classes by number, as YAML reads them, by the text of the number."""
    if not isinstance(value, dict):
        return value
    return {str(key) if type(key) is int else key: name for key, name in value.items()}


class Annotations(Section):
    """How the export of an annotation tool becomes rows of the source's format."""

    layout: Layout
    """Which tool's: COCO or CVAT (images 1.1) file, Label Studio JSON, VIA 2 project, LabelMe or YOLO folder."""
    classes: Annotated[
        dict[str, Word | None],
        BeforeValidator(_class_names, json_schema_input_type=dict[str, Word | None]),
        AfterValidator(ReadOnlyDict),
    ] = Field(default_factory=ReadOnlyDict)
    """Class, by name or number -> what it is called; null leaves it out, and those not listed keep their names."""
    rows: Literal["class", "image"] = "class"
    """A row for each class in an image, asked by {phrase}; or for each image, with all objects and their names."""
    unlabelled: Literal["skip", "keep"] = "skip"
    """Images without an object: leave out, or learn that nothing is there (rows: class: of one of the classes)."""
    rotated: Literal["error", "bounds"] = "error"
    """Turned boxes: refuse the image, or take the upright box around each."""
    label: Word | None = None
    """The region attribute that is the class, where there are several; for layout via only."""
    questions: Annotated[dict[str, Word | None], AfterValidator(ReadOnlyDict)] = Field(default_factory=ReadOnlyDict)
    """Label Studio's text area or choice -> its question, with {key} of the task's data; null leaves it out."""

    def findings(self) -> Iterator[Finding]:
        if self.label is not None and self.layout != "via":
            yield Finding(("label", "layout"), "is for layout via only", "remove label")
        if self.questions and self.layout != "label_studio":
            yield Finding(("questions", "layout"), "is for layout label_studio only", "remove questions")


class Split(Section):
    """Cuts what is trained on into a part to train on and one to evaluate on, whole documents at a time."""

    eval: Annotated[float, Field(gt=0, lt=1)]
    """Share of the documents to evaluate on, such as 0.1."""
    by: Word = "image"
    """What a document is: rows that share an image, or rows with the same value in the column of this name."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Draws the documents; rows that are added later do not move others, and the recipe's seed does not count."""


class Part(Split):
    """One part of a source that is cut."""

    take: Literal["train", "eval"]
    """Which one."""


class Source(Section):
    """A dataset, or a part of one, in one of the formats."""

    path: Word
    """File, files (data/*.jsonl), folder or hub dataset id; a relative path starts at the working directory."""
    format: Literal["messages", "qwen_json", "llava", "swift", "texts", "vqa", "grounding", "caption", "fields"]
    """What a row looks like."""
    config: Word | None = None
    """Configuration of a hub dataset that has several."""
    split: Word | None = None
    """Split of a hub dataset or of a YOLO folder, such as train or validation; or the sheet of an Excel workbook."""
    columns: Annotated[dict[str, Word], AfterValidator(ReadOnlyDict)] = Field(default_factory=ReadOnlyDict)
    """Role -> name of its column, where the two differ."""
    box_form: Literal["xyxy", "xywh"] | None = None
    """Boxes, in pixels, are two corners (xyxy) or a corner, width and height (xywh); for format grounding only."""
    prompt: Word | None = None
    """What the user says: {question} or {phrase} is filled in; without {phrase}, grounding asks for all objects."""
    fields: Words = ()
    """Of format fields: the fields of a document, each a column, in the order of the reply."""
    reply: Literal["value", "json"] = "value"
    """Of format fields: a question for each field, replied to with its value, or one for all, replied to with JSON."""
    missing: Literal["write_null", "leave_out"] | None = None
    """Of format fields: null replies null or asks nothing where there is no value; by default null in JSON only."""
    nested: Words = ()
    """Of format fields: those whose text is JSON, such as the lines of an invoice in a CSV file."""
    prompts: Word | Words | Annotated[dict[str, Word | Words], AfterValidator(ReadOnlyDict)] | None = None
    """Of format fields: what the user says, with {field} (or {fields}); several phrasings, also by field."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is used an epoch, on average: 2.0 twice, 0.5 in every other one."""
    limit: Count | None = None
    """Only this many of the first rows."""
    streaming: bool = False
    """Fetch a hub dataset row by row, and none beyond limit, instead of whole."""
    annotations: Annotations | None = None
    """How `path` is read, where it is the export of an annotation tool; null is a file, folder or dataset of rows."""
    encoding: Word | None = None
    """Of a text file, such as gbk or cp1252; null is UTF-8, or UTF-16 and UTF-32 where the file shows that."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """What is between the fields of a .csv, .tsv or .txt file; null is what the file shows."""

    part: Part | None = None
    """Only the part of the rows that a cut by documents makes; data.split sets it for all sources."""

    def findings(self) -> Iterator[Finding]:
        yield from self._findings_of_fields()
        roles = (*ROLES[self.format], *self.fields)
        for role in self.columns:
            if role not in roles:
                meant = nearest(role, roles)
                remedy = f"did you mean {' or '.join(meant)}? " if meant else ""
                remedy += f"The roles are {', '.join(roles)}"
                yield Finding((f"columns.{role}", "format"), f"format {self.format} has no such role", remedy)
        if self.annotations is not None:
            yield from self._annotation_findings(self.annotations)
        elif self.format == "grounding" and self.box_form is None:
            yield Finding(
                ("format", "box_form"),
                "boxes in pixels are stored in two ways, and box_form does not say which",
                "set box_form: xyxy or xywh",
            )
        if self.format != "grounding" and self.box_form is not None:
            yield Finding(("box_form", "format"), f"format {self.format} has no boxes in pixels", "remove box_form")
        if self.encoding is not None and not is_text_encoding(self.encoding):
            remedy = "write its common name, such as gbk, big5, shift_jis, cp1252 or utf-16"
            yield Finding(("encoding",), f"{self.encoding!r} is no encoding that is known", remedy)
        if self.delimiter is not None and self.delimiter in '"\r\n':
            yield Finding(("delimiter",), "quotes and line ends are between no fields", "give the mark between fields")
        if self.prompt is not None and self.format == "fields":
            yield Finding(("prompt", "format"), "format fields may have several prompts", "write prompts")
        elif self.prompt is not None and self.format not in PLACEHOLDERS:
            yield Finding(("prompt", "format"), f"rows of format {self.format} bring their prompts", "remove prompt")
        elif self.prompt is not None and PLACEHOLDERS[self.format] not in self.prompt:
            needed = PLACEHOLDERS[self.format]
            yield Finding(("prompt", "format"), f"there is no {needed} in it to fill in", f"write {needed} in it")

    def _annotation_findings(self, annotations: Annotations) -> Iterator[Finding]:
        layout = f"annotations of layout {annotations.layout}"
        formats = LAYOUTS[annotations.layout]
        if self.format not in formats:
            remedy = f"set format: {' or '.join(formats)}"
            yield Finding(("format", "annotations.layout"), f"{layout} are not read as {self.format}", remedy)
        for key in (
            "columns",
            "box_form",
            "config",
            "streaming",
            "encoding",
            "delimiter",
            *(() if annotations.layout == "yolo" else ("split",)),
        ):
            if getattr(self, key):
                yield Finding((key, "annotations"), f"{layout} say that themselves", f"remove {key}")
        if self.format != "grounding":
            keys = ("rows", "unlabelled", "rotated", *(() if self.format == "vqa" else ("classes",)))
            for key in keys:
                # Not whether it is written: the recipe of a run has every key.
                if getattr(annotations, key) != getattr(Annotations(layout=annotations.layout), key):
                    reason = f"is of boxes, and format {self.format} has none"
                    yield Finding((f"annotations.{key}", "format"), reason, f"remove {key}")
        if self.format == "vqa" and not annotations.questions:
            reason = "nothing says which questions the text areas and choices answer"
            yield Finding(("annotations.questions", "format"), reason, "name each with its question")
        if self.format != "vqa" and annotations.questions:
            yield Finding(("annotations.questions", "format"), "is for format vqa only", "remove questions")
        if self.format == "grounding":
            asks_phrase = self.prompt is None or "{phrase}" in self.prompt
            if annotations.rows == "image" and asks_phrase:
                reason = "asks for all objects of an image, and the prompt for one phrase"
                remedy = "set prompt to what is asked, such as: Find all objects."
                yield Finding(("annotations.rows", "prompt"), reason, remedy)
            if annotations.rows == "class" and not asks_phrase:
                reason = "there is no {phrase} in it to fill in"
                remedy = "write {phrase} in it, or set annotations.rows: image"
                yield Finding(("prompt", "annotations.rows"), reason, remedy)

    def _findings_of_fields(self) -> Iterator[Finding]:
        if self.format == "fields":
            for key, reason, remedy in problems_of_fields(self.fields, self.reply, self.nested, self.prompts):
                yield Finding((key,), reason, remedy)
            return
        for key in ("fields", "reply", "missing", "nested", "prompts"):
            if getattr(self, key) != type(self).model_fields[key].default:
                yield Finding((key, "format"), f"is of format fields, not of {self.format}", f"remove {key}")


def is_text_encoding(name: str) -> bool:
    """Whether Python knows an encoding of text by this name."""
    try:
        b"a".decode(name)  # refuses codecs that are not of text, such as base64
    except UnicodeError:  # a is no whole character in it
        return True
    except (LookupError, ValueError):
        return False
    return True


def one_as_list(value: Any) -> Any:
    """A single source as a list of one."""
    return (value,) if isinstance(value, dict | Source) else value


Sources = Annotated[
    tuple[Source, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(one_as_list, json_schema_input_type=Source | Annotated[tuple[Source, ...], Field(min_length=1)]),
]


class NamedSource(Source):
    """A dataset to evaluate on, whose score is told apart from those of the others."""

    name: Word | None = None
    """The word its score is logged under, such as old for eval_anls_old; null takes the name of its file."""

    def findings(self) -> Iterator[Finding]:
        yield from super().findings()
        if self.name is not None and not NAME.fullmatch(self.name):
            yield Finding(("name",), f"{self.name!r} is not one word", "use letters, digits, _, . and - only")


NamedSources = Annotated[
    tuple[NamedSource, ...],
    Strict(False),
    Field(min_length=1),
    BeforeValidator(
        one_as_list,
        json_schema_input_type=NamedSource
        | Annotated[tuple[NamedSource, ...], Field(min_length=1)]
        | Literal["split"],
    ),
]
