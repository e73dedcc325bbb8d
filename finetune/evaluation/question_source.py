"""How a source of questions is read for a task: its columns, the form of its boxes, the fields that it asks for."""

from collections.abc import Mapping
from typing import Protocol

from finetune.data.formats.document_fields import WantedFields
from finetune.data.formats.names import CONVERSATIONS
from finetune.data.formats.row_format import COLUMNS, LATER_COLUMNS, RowFormat
from finetune.data.sample import DataError
from finetune.data.samples import wanted_fields
from finetune.data.sources.sources import FieldsSource, Location
from finetune.data.split import Part
from finetune.evaluation.task import Task
from finetune.recipe.problems import nearest

# Roles of columns in addition to those of the formats.
_MORE_ROLES = ("id", "group", "options", "hint", "document")


class QuestionSource(Location, FieldsSource, Protocol):
    """A source of questions: where its rows are, and how they are read. A `format` of None is the task's."""

    @property
    def format(self) -> str | None: ...
    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def prompt(self) -> str | None: ...
    @property
    def box_form(self) -> str | None: ...
    @property
    def part(self) -> Part | None: ...


def fields_asked(source: QuestionSource) -> WantedFields:
    """What a source of format `fields` asks for.

    Raises:
        DataError: no fields, unknown ones, or prompts that do not fit.
    """
    try:
        return wanted_fields(source)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from None


def columns_of(source: QuestionSource, task: Task, wanted: WantedFields | None = None) -> dict[str, str]:
    """Role -> column: the source's name for it, else the task's, else the format's own.

    Raises:
        DataError: another format than the task's, or a role that there is not.
    """
    if source.format is not None and source.format != task.format:
        raise DataError(f"{source.path}: task {task.name} reads format {task.format}, not {source.format}")
    own = (*COLUMNS[task.format], *(() if wanted is None else wanted.names))
    roles = own if task.format in CONVERSATIONS else (*own, *_MORE_ROLES)
    for role in source.columns or {}:
        if role not in roles:
            meant = nearest(role, roles)
            said = f"did you mean {' or '.join(meant)}? " if meant else ""
            raise DataError(f"{source.path}: columns: there is no role {role}; {said}The roles are {', '.join(roles)}")
    if task.format in CONVERSATIONS:
        return dict(RowFormat(task.format, source.columns or {}).columns)
    return {role: role for role in own} | dict(task.columns) | dict(source.columns or {})


def known_columns(task: Task, columns: Mapping[str, str]) -> dict[str, str]:
    """As `RowFormat.known_columns`, with the roles that only evaluation has."""
    later = () if task.is_detection else LATER_COLUMNS.get(task.format, ())
    return {role: name for role, name in sorted(columns.items()) if role not in later or role != name}


def box_form_of(source: QuestionSource, task: Task) -> str | None:
    """How gold boxes are written in their column; None where there are none.

    Raises:
        DataError: nothing says how.
    """
    if task.format != "grounding":
        return None
    if source.annotations is not None:
        return "xyxy"  # what an export is read into
    box_form = source.box_form or task.box_form
    if box_form is None:
        raise DataError(f"{source.path}: boxes are stored in two ways, and box_form does not say which: xyxy or xywh")
    return box_form
