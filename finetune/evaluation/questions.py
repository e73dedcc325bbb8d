"""The questions of one source: its rows, with the prompts of a task.

    questions = Questions(source, find_task("docvqa"), style="chat")
    prompt = questions[0].render(tokenizer, n_queries)

The constructor checks all rows once, so that bad rows are reported before a model is loaded. After that a question is
read on access, and its images only when it is rendered.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, overload

from finetune.data.annotated_boxes import in_pixels
from finetune.data.checks.markup import check_markup_names, find_markup, why_refused
from finetune.data.checks.problems import MOST_IMAGES, refuse_views, too_many_images
from finetune.data.formats.names import FIELDS
from finetune.data.formats.places import PLACE
from finetune.data.formats.unread import unread_names
from finetune.data.images.image_files import absolute, check_image, upright_size
from finetune.data.images.pages import Pages
from finetune.data.row_progress import RowProgress
from finetune.data.sample import BadField, BadRow, DataError
from finetune.data.sources.rows import Rows
from finetune.data.split import read_part
from finetune.data.summary import name_counts
from finetune.errors import InputError, UserError
from finetune.evaluation.question import Question, fill_images
from finetune.evaluation.question_source import QuestionSource, box_form_of, columns_of, fields_asked, known_columns
from finetune.evaluation.solved_examples import SolvedExamples
from finetune.evaluation.task import Task
from finetune.evaluation.task_rows import Asked, RowReader, without_sources
from finetune.evaluation.tasks import check_prompt
from finetune.replies.task_replies import Style
from qwenvl import ImageAccess
from qwenvl.views import Views

__all__ = ["Question", "Questions"]


class RowImages(Sequence[Any]):
    """The images of a row, read from the data on access and not kept."""

    def __init__(self, questions: "Questions", index: int, count: int):
        self._questions, self._index, self._count = questions, index, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int | slice) -> Any:
        return self._questions.image_sources(self._index)[place]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._questions.image_sources(self._index))


class Questions(Sequence[Question]):
    """The questions of one source, by number.

    Args:
        source: its columns map the task's roles (and `id`, `group`, `options`, `hint`, `document`), its format is the
            task's or None, its prompt replaces all others.
        task: gives the prompts and the metric.
        prompt: replaces the task's where the source has none; None keeps the task's.
        system: a system message before each question of style chat; None is the default one.
        images_root, access: as for `finetune.data.samples.Samples`.
        style: "chat", or "base" for raw text.
        shots: number of solved examples before each question, for style base. The question's id is the seed of their
            draw, so they are the same in every run.
        shot_source: where they are drawn from; None is the source itself. None of them shares an image or a document
            with the question, see `solved_examples`.
        grounding, box_edge: read markup in all texts as tokens, and coordinates of 1000, as these keys of a recipe's
            `data` do.
        on_bad_row: "error" reports all bad rows together; "skip" leaves them out and lists them.
        pages: how files of several pages become several images; None refuses them unless a page is named. Where
            boxes are asked for, a page is named in any case.
        views: what pictures each image becomes; None is itself alone.
        ignore, markup_as_text: as in a recipe's `data`: columns that are not read, and markup that is asked as text.
        look_for_images: treat a row whose image file is missing as a bad row; False leaves that to the reader of the
            image.

    Attributes:
        task, style: as given.
        name: of the source.
        prompt: what is asked, with placeholders; empty for conversations.
        columns: role -> column.
        access: which files and URLs the images may reach.
        ids: unique ids of the questions.
        answered: whether there are gold answers to score with; False where all are hidden.
        problems: the problems of the rows that were left out.
        pages_left_out: pages of files that are not shown, as `pages` says, over all questions.
        unread: columns and keys that hold something and are not read -> rows that have them.
        markup: kinds of markup that are asked as text -> rows that have them.

    Raises:
        MissingFileError: the source's file does not exist.
        DataError: a source that cannot be read or holds no rows, wrong columns, bad rows, answers of some rows hidden
            and of others not, or too few examples to draw from.
        UserError: a prompt without its placeholder, or shots for style chat.
    """

    def __init__(
        self,
        source: QuestionSource,
        task: Task,
        *,
        prompt: str | None = None,
        system: str | None = None,
        images_root: str | Path | None = None,
        access: ImageAccess | None = None,
        style: Style = "chat",
        shots: int = 0,
        shot_source: QuestionSource | None = None,
        grounding: bool = False,
        box_edge: Literal["error", "clamp"] = "error",
        on_bad_row: Literal["error", "skip"] = "error",
        ignore: Collection[str] = (),
        markup_as_text: Sequence[str] = (),
        look_for_images: bool = True,
        pages: Pages | None = None,
        views: Views | None = None,
    ):
        if shots and style == "chat":
            raise UserError("solved examples are for base models: set shots to 0, or style to base")
        self.task, self.style = task, style
        self._look_for_images = look_for_images
        self._pages = None if task.is_grounding else pages
        self._views = views
        if views is not None and not views.page and task.is_grounding:
            raise UserError(
                f"task {task.name} asks for boxes, which are of the whole page, and the views leave it out ({views})"
            )
        self._ignore, self._markup_as_text = frozenset(ignore), check_markup_names(markup_as_text)
        wanted = fields_asked(source) if task.format == FIELDS else None
        self.name, self.columns = str(source.path), columns_of(source, task, wanted)
        if source.prompt is not None:
            check_prompt(task, source.prompt)
        self.prompt = source.prompt or prompt or task.prompt(style)
        access = ImageAccess() if access is None else access
        root = images_root if images_root is not None else access.root
        self._rows: Rows = read_part(source, task.format, root)
        self._count = len(self._rows) if source.limit is None else min(source.limit, len(self._rows))
        if self._count < 1:
            raise DataError(f"{source.path}: {'limit is below 1' if len(self._rows) else 'holds no rows'}")
        self._root = Path(self._rows.folder if root is None else root).absolute()
        self.access = replace(access, root=self._root, dpi=access.dpi if pages is None else pages.dpi)
        self._reader = RowReader(
            task=task,
            columns=self.columns,
            prompt=self.prompt,
            style=style,
            box_form=box_form_of(source, task),
            grounding=grounding,
            box_edge=box_edge,
            image_size=self._image_size,
            system=system,
            wanted=wanted,
            text_places=PLACE not in self._markup_as_text,
        )
        self._read_all(on_bad_row)
        self._shots, self._examples = shots, self
        if shots and shot_source is not None:
            self._examples = Questions(
                shot_source,
                task,
                prompt=self.prompt,
                images_root=images_root,
                access=access,
                style=style,
                grounding=grounding,
                box_edge=box_edge,
                on_bad_row=on_bad_row,
                pages=pages,
                views=views,
                ignore=ignore,
                markup_as_text=markup_as_text,
            )
        self._solved = SolvedExamples(self, self._examples, shots) if shots else None

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        """The question with this number.

        Raises:
            BadRow: its row has changed since the constructor checked it, and is bad now.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} questions, no index {index}")
        index %= len(self)
        question = self.plain(index)
        return replace(question, shots=tuple(self._solved.of(index))) if self._solved else question

    def plain(self, index: int) -> Question:
        """The question with this number, without solved examples; errors as for `[]`."""
        row, item = self._row_of[index], self._item_of[index]
        # A scan leaves image bytes on disk.
        given = self._rows[row] if self._reads_images else next(iter(self._rows.scan(row, row + 1)))
        if isinstance(given, BadRow):
            raise given
        asked = self._item(given, row, item)
        return Question(
            id=self.ids[index],
            origin=self._rows.origin(row),
            text=asked.text,
            answers=asked.answers,
            box=asked.box,
            image_size=asked.image_size,
            group=self._reader.group(given),
            images=RowImages(self, index, len(asked.sources)),
            access=self.access,
            style=self.style,
            messages=asked.messages,
            options=asked.options,
            by_likelihood=self.task.by_likelihood,
            objects=asked.objects,
            fields=asked.fields,
            views=self._views,
        )

    @property
    def notes(self) -> list[str]:
        """What is to be said of the source as a whole: what was left out of it, and what of its rows is not read."""
        said = {"markup asked as text": self.markup, "not read": self.unread}
        counted = [f"{what}: {name_counts(dict(counts.most_common()))}" for what, counts in said.items() if counts]
        return [*self._rows.notes, *counted]

    def fingerprint(self) -> str:
        """Hexadecimal digest of the rows, how they are read, the prompt and the solved examples."""
        reader = self._reader
        asked: dict[str, Any] = {
            "rows": self._rows.fingerprint(),
            "used": self._count,
            "task": [self.task.name, self.task.metric, self.task.format],
            "columns": known_columns(task=self.task, columns=reader.columns),
            "prompt": [reader.prompt, reader.system, self.style, reader.box_form, reader.grounding],
            "shots": [
                self._shots,
                self._examples.fingerprint() if self._examples is not self else "",
                "other documents" if self._shots else "",
            ],
            # Only where they are set: earlier evaluations have neither.
            **({"ignore": sorted(self._ignore)} if self._ignore else {}),
            **({"markup_as_text": sorted(self._markup_as_text)} if self._markup_as_text else {}),
        }
        if reader.wanted is not None:
            asked["fields"] = asdict(reader.wanted)
        if self._pages is not None:
            asked["pages"] = asdict(self._pages)
        if self._views is not None:
            asked["views"] = self._views.to_json()
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @property
    def _reads_images(self) -> bool:
        """Whether the images of a row are looked at for its questions: for their sizes, or their pages."""
        return self.task.is_grounding or self.task.format == "swift" or self._pages is not None

    # ---- all rows, once

    def _read_all(self, on_bad_row: str) -> None:
        self.ids: list[str] = []
        self._row_of = array("q")  # question -> row
        self._item_of = array("q")  # question -> which of its row's
        bad: dict[int, BadRow] = {}
        hidden: dict[int, BadRow] = {}
        taken: set[str] = set()
        self.pages_left_out = 0
        self.unread: Counter[str] = Counter()
        self.markup: Counter[str] = Counter()
        # A scan may replace image bytes by placeholders, from which neither size nor pages can be read.
        scan = Rows.scan if self._reads_images else type(self._rows).scan
        with RowProgress("reading questions", self._count) as progress:
            for row, given in enumerate(scan(self._rows, 0, self._count)):
                progress.add(1)
                origin = self._rows.origin(row)
                if isinstance(given, BadRow):
                    bad[row] = given
                    continue
                try:
                    asked, unread, markup = self._checked(given, row)
                    name = self._reader.question_id(given) or f"row {origin.row}"
                except BadRow as error:
                    bad[row] = error
                    continue
                except BadField as error:
                    bad[row] = BadRow(origin, error.field, error.reason)
                    continue
                self.pages_left_out += sum(question.pages_left_out for question in asked)
                self.unread.update(unread)
                self.markup.update(markup)
                if any(not question.answers for question in asked):
                    hidden[row] = BadRow(origin, "answers", "are hidden")
                for item in range(len(asked)):
                    place = f".{item + 1}" if len(asked) > 1 else ""
                    question_id = f"{name}{place}"
                    if question_id in taken:  # the data's own id is not unique
                        question_id = f"{name} (row {row + 1}){place}"
                    taken.add(question_id)
                    self.ids.append(question_id)
                    self._row_of.append(row)
                    self._item_of.append(item)
        self._leave_out(bad, hidden, on_bad_row)

    def _checked(self, given: Mapping[str, Any], row: int) -> tuple[list[Asked], Collection[str], Collection[str]]:
        """The questions of a row, what of it is not read, and the kinds of markup that are asked as text."""
        try:
            unread = unread_names(given, self.task.format, self.columns, self._ignore)
        except BadField as error:
            raise BadRow(self._rows.origin(row), error.field, error.reason) from None
        asked = self._asked(given, row)
        if len(asked[0].sources) > MOST_IMAGES:
            raise BadRow(self._rows.origin(row), "images", too_many_images(len(asked[0].sources)))
        markup: set[str] = set()
        for question in asked:
            if self._views is not None and question.sources:
                try:
                    refuse_views(question.messages, self._views, self._reader.grounding)
                except BadField as error:
                    raise BadRow(self._rows.origin(row), error.field, error.reason) from None
            found = find_markup(question.messages, self._reader.grounding)
            markup |= {look.kind for look in found}
            if refused := [look for look in found if look.kind not in self._markup_as_text]:
                raise BadRow(self._rows.origin(row), refused[0].place, why_refused(refused))
        for number, source in enumerate(asked[0].sources if self._look_for_images else ()):
            try:
                check_image(absolute(source, self._root), self.access)
            except InputError as error:
                raise BadRow(self._rows.origin(row), f"images[{number}]", str(error)) from error
        return asked, unread, markup

    def _leave_out(self, bad: dict[int, BadRow], hidden: dict[int, BadRow], on_bad_row: str) -> None:
        """Leave out bad rows and rows with hidden answers, both by row; or raise, as `on_bad_row` says."""
        if bad and on_bad_row == "error":
            raise DataError(
                f"{self.name}: of {self._count:,} rows, {len(bad):,} cannot be asked as task {self.task.name} "
                "(fix them, or leave them out with --on-bad-row skip, in a recipe data.on_bad_row: skip):",
                list(bad.values()),
            )
        if not self.ids:
            raise DataError(f"{self.name}: none of the {self._count:,} rows can be asked:", list(bad.values()))
        kept = [place for place, row in enumerate(self._row_of) if row not in hidden]
        self.answered = bool(kept)
        left_out = bad | hidden if self.answered else bad
        self.problems = [problem for _, problem in sorted(left_out.items())]
        if not hidden or not self.answered:
            return
        if on_bad_row == "error":
            raise DataError(
                f"{self.name}: the answers of {len(hidden):,} rows are hidden and those of the others are not; score "
                "the answered rows in a file of their own, or leave the others out with --on-bad-row skip, in a "
                "recipe data.on_bad_row: skip:",
                list(hidden.values()),
            )
        self.ids = [self.ids[place] for place in kept]
        self._row_of = array("q", (self._row_of[place] for place in kept))
        self._item_of = array("q", (self._item_of[place] for place in kept))

    # ---- rows and images, for solved examples

    def row_of(self, index: int) -> int:
        """The row of a question, from 0."""
        return self._row_of[index]

    def rows_fingerprint(self) -> str:
        """Hexadecimal digest of the rows alone."""
        return self._rows.fingerprint()

    def scan_rows(self) -> Iterator[tuple[int, Mapping[str, Any], list[Any]]]:
        """Each row that has questions: its number, the row, and its images, paths absolute.

        Images inside the data may be placeholders, see `Rows.scan`.
        """
        asked = set(self._row_of)
        scan = Rows.scan if self._reads_images else type(self._rows).scan
        for row, given in enumerate(scan(self._rows, 0, self._count)):
            if row in asked and not isinstance(given, BadRow):
                sources = self._asked(given, row)[0].sources
                yield row, given, [absolute(source, self._root) for source in sources]

    def image_sources(self, index: int) -> tuple[Any, ...]:
        """The images of a question, paths absolute."""
        row = self._row_of[index]
        asked = self._item(self._rows[row], row, self._item_of[index])
        return tuple(absolute(source, self._root) for source in asked.sources)

    # ---- one question

    def _item(self, given: Mapping[str, Any], row: int, item: int) -> Asked:
        asked = self._asked(given, row)
        if item >= len(asked):
            raise BadRow(self._rows.origin(row), "row", "has fewer questions than it had when all were looked at")
        return asked[item]

    def _asked(self, given: Mapping[str, Any], row: int) -> list[Asked]:
        try:
            given, _ = in_pixels(given, self._image_size)
            if not self._ignore.isdisjoint(given):
                given = {column: value for column, value in given.items() if column not in self._ignore}
            self._reader.group(given)
            asked = self._reader.questions(given)
            return asked if self._pages is None else [self._with_pages(one, self._pages) for one in asked]
        except BadField as error:
            raise BadRow(self._rows.origin(row), error.field, error.reason) from None

    def _with_pages(self, asked: Asked, pages: Pages) -> Asked:
        """A question whose files of several pages are several images; its sources are absolute."""
        filled = fill_images(asked.messages, [absolute(source, self._root) for source in asked.sources])
        expanded = pages.expand(filled, self.access)
        sources: list[Any] = []
        messages = tuple(without_sources(message, sources) for message in expanded.messages)
        return replace(asked, messages=messages, sources=tuple(sources), pages_left_out=expanded.left_out)

    def _image_size(self, source: Any) -> tuple[int, int]:
        return upright_size(absolute(source, self._root), self.access)
