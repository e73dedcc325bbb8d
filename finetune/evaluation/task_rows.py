"""The questions in a row of a task's data: from its columns, or from a conversation up to its last reply.

No image is opened, except that boxes need the size in its header. A row whose image bytes are placeholders
(`Rows.scan`) gives the same questions.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetune.data.formats import fields
from finetune.data.formats.document_fields import WantedFields, document_images
from finetune.data.formats.grounding import (
    NO_OBJECT,
    PLACEHOLDER,
    Search,
    asked,
    boxes_column,
    boxes_reply,
    read_searches,
)
from finetune.data.formats.messages import Message
from finetune.data.formats.names import CONVERSATIONS, FIELDS
from finetune.data.formats.pixel_boxes import box_inside
from finetune.data.formats.row_format import RowFormat
from finetune.data.message_parts import boxes_inside, content_parts
from finetune.data.sample import BadField
from finetune.errors import InputError, UserError
from finetune.evaluation.gold_answers import gold_answers, gold_letter, kind_of, may_be_hidden
from finetune.evaluation.predictions import split_last_reply
from finetune.evaluation.task import Task
from finetune.metrics.boxes import Box as Corners
from finetune.metrics.choices import LETTERS
from finetune.metrics.detection import GoldBoxes, NamedBox, reply_boxes
from finetune.metrics.document_fields import FieldsAsked
from finetune.replies.task_replies import Style
from qwenvl.text.boxes import Box, box_markup
from qwenvl.text.chat import is_trained
from qwenvl.text.grounding import clamp_to_edge, parse_grounding, strip_markup

ImageSize = Callable[[Any], tuple[int, int]]
_PLACES = re.compile(r"\{(question|phrase|options|hint)\}")
# The column that problems of a conversation are reported under.
_TURNS = dict.fromkeys(("qwen_json", "llava"), "conversations") | {"messages": "messages", "texts": "texts"}
_TURNS["swift"] = "response"
_NO_HINT = "N/A"  # as in the published prompt of multiple choice


@dataclass(frozen=True)
class Asked:
    """One question of a row.

    Attributes:
        text: the question as in the data.
        messages: the prompt's messages; their image parts have no source.
        sources: the sources of these parts in order, as in the row.
        answers: gold answers; empty where they are hidden.
        box: gold box, x1, y1, x2, y2 in pixels, or None.
        image_size: width and height in pixels where there may be a box, or None.
        options: of multiple choice.
        objects: all gold boxes, for detection; else None.
        fields: of a document, that are asked for.
        pages_left_out: pages of its files that are not among its images.
    """

    text: str
    messages: tuple[Message, ...]
    sources: tuple[Any, ...]
    answers: tuple[str, ...] = ()
    box: Corners | None = None
    image_size: tuple[int, int] | None = None
    options: tuple[str, ...] = ()
    objects: GoldBoxes | None = None
    pages_left_out: int = 0
    fields: FieldsAsked | None = None


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one source for a task.

    Attributes:
        task: the task.
        columns: role -> column, for every role.
        prompt: with placeholders for the row's texts.
        style: of the model that is asked.
        box_form: form of a gold box in its column.
        grounding: treat every text as grounding text.
        box_edge: what coordinates of 1000 in boxes are, see `data.rules.Rules`.
        image_size: gives the width and height of an image source of a row; raises ValueError if it cannot.
        system: a system message before what is asked, of style chat; None is the default one. Conversations have
            their own.
        wanted: of format fields, which fields are asked for.
        text_places: whether `<image>` in a conversation's texts may be the place of an image.
    """

    task: Task
    columns: Mapping[str, str]
    prompt: str
    style: Style
    box_form: str | None
    grounding: bool
    image_size: ImageSize
    system: str | None = None
    box_edge: Literal["error", "clamp"] = "error"
    wanted: WantedFields | None = None
    text_places: bool = True

    def questions(self, row: Mapping[str, Any]) -> list[Asked]:
        """The questions of a row, at least one.

        Raises:
            BadField: a field does not fit the task.
        """
        if self.task.format in CONVERSATIONS:
            asked = [self._conversation(row)]
        elif self.task.format == "grounding":
            asked = self._phrases(row)
        elif self.task.format == "caption":
            asked = [self._caption(row)]
        elif self.task.format == FIELDS:
            return self._fields(row)
        else:
            asked = self._columns(row)
        if not (self.task.is_grounding or self.task.published):
            asked = [replace(one, answers=self._texts(one.answers)) for one in asked]
        fewest = self.task.fewest_answers
        for question in asked:
            if question.answers and len(question.answers) < fewest:
                raise BadField(
                    self.columns["answers"],
                    f"holds {len(question.answers)} answer(s); {self.task.metric} compares with those of at least "
                    f"{fewest} people. For single answers use exact_match or anls",
                )
        return asked

    def _texts(self, answers: tuple[str, ...]) -> tuple[str, ...]:
        """Gold answers without markup, as replies are compared; and without blank ones, except where all count."""
        texts = tuple(strip_markup(answer) for answer in answers)
        if answers and not any(text.strip() for text in texts):
            raise BadField(
                self.columns.get("answers") or self.columns.get("caption") or "its last reply",
                f"holds nothing but boxes, and {self.task.metric} compares texts: use metric grounding",
            )
        return texts if self.task.metric == "vqa_score" else tuple(text for text in texts if text.strip())

    def group(self, row: Mapping[str, Any]) -> str | None:
        """The group of a row; None where the data has no groups.

        Raises:
            BadField: the score is a mean of groups, and the row has none.
        """
        if "group" not in self.columns:
            return None
        column = self.columns["group"]
        value = fields.field(row, column) if self.task.mean_of_groups else row.get(column)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BadField(column, f"must be text or a whole number, not {type(value).__name__}")
        return self.task.group_names.get(str(value), str(value))

    def question_id(self, row: Mapping[str, Any]) -> str | None:
        """The id that the data gives to a row's question; None where it gives none.

        Raises:
            BadField: it is neither text nor a whole number.
        """
        column = self.columns.get("id")
        if column is None:
            return None
        value = row.get(column)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BadField(column, f"must be text or a whole number, not {type(value).__name__}")
        return str(value)

    # ---- columns

    def _columns(self, row: Mapping[str, Any]) -> list[Asked]:
        images = self._images(row)
        name = self.columns["question"]
        given = fields.field(row, name)
        answers_name = self.columns["answers"]
        if answers_name == "answers" and "answers" not in row and "answer" in row:
            answers_name = "answer"
        answers = may_be_hidden(row, answers_name)
        if isinstance(given, str):
            return [self._question(row, images, fields.one_text(given, name), name, answers, answers_name)]
        if not isinstance(given, list | tuple) or not given:
            raise BadField(name, f"must be text or a list of texts, not {kind_of(given)}")
        if answers is None:
            answers = [None] * len(given)
        if not isinstance(answers, list | tuple) or len(answers) != len(given):
            reason = f"must be a list of {len(given)}, one for each question, not {kind_of(answers)}"
            raise BadField(answers_name, reason)
        return [
            self._question(row, images, question, f"{name}[{index}]", answer, f"{answers_name}[{index}]")
            for index, (question, answer) in enumerate(zip(given, answers, strict=True))
        ]

    def _question(
        self, row: Mapping[str, Any], images: list[Any], question: Any, name: str, answer: Any, answer_name: str
    ) -> Asked:
        text = fields.text(question, name)
        if self.task.metric != "multiple_choice":
            return self._asked(text, images, {"question": text}, answers=gold_answers(answer, answer_name))
        column = self.columns["options"]
        given = fields.field(row, column)
        if not isinstance(given, list | tuple) or not 2 <= len(given) <= len(LETTERS):
            raise BadField(column, f"must be a list of 2 to {len(LETTERS)} texts, not {kind_of(given)}")
        options = tuple(fields.text(option, f"{column}[{index}]") for index, option in enumerate(given))
        lettered = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        gold = () if answer is None else (gold_letter(answer, options, answer_name, self.task.name),)
        places = {"question": text, "options": lettered, "hint": self._hint(row)}
        return self._asked(text, images, places, answers=gold, options=options)

    def _hint(self, row: Mapping[str, Any]) -> str:
        """The context of a question, as ScienceQA has it; most have none."""
        if "{hint}" not in self.prompt:
            return ""
        column = self.columns.get("hint")
        value = row.get("hint") if column is None else may_be_hidden(row, column)
        return _NO_HINT if value is None or value == "" else fields.text(value, column or "hint")

    def _caption(self, row: Mapping[str, Any]) -> Asked:
        name = self.columns["caption"]
        captions = gold_answers(may_be_hidden(row, name), name)
        return self._asked(self.prompt, self._images(row), {}, answers=captions)

    def _fields(self, row: Mapping[str, Any]) -> list[Asked]:
        assert self.wanted is not None, "`Questions` gives it for this format"
        wanted, images = self.wanted, document_images(row, self.columns["image"])
        values = wanted.values(row, self.columns)
        ending = "" if self.style == "chat" else " Answer:"
        if wanted.reply == "json":
            gold = FieldsAsked(wanted.names, tuple(values[name] for name in wanted.names), is_json=True)
            text, answer = wanted.prompt(None, None), wanted.json_answer(values)
            return [self._asked(text, images, {}, said=text + ending, answers=(answer,), fields=gold)]
        asked = []
        for name in wanted.asked(values):
            gold = FieldsAsked((name,), (values[name],), is_json=False)
            text, answer = wanted.prompt(name, None), wanted.answer(values[name])
            asked.append(self._asked(text, images, {}, said=text + ending, answers=(answer,), fields=gold))
        if not asked:
            raise BadField("fields", f"none of {', '.join(wanted.names)} has a value, so nothing can be asked")
        return asked

    def _phrases(self, row: Mapping[str, Any]) -> list[Asked]:
        source = fields.image(fields.field(row, self.columns["image"]), self.columns["image"])
        try:
            size = self.image_size(source)
        except InputError as error:
            raise BadField(self.columns["image"], str(error)) from error
        name = boxes_column(row, self.columns)
        hidden = may_be_hidden(row, name) is None
        # Phrases are checked where boxes are hidden too: in their place is one of the whole image.
        given = {**row, name: [0, 0, *size], self.columns["labels"]: None} if hidden else row
        asks_all = hidden and PLACEHOLDER not in self.prompt
        searches = [Search((), ())] if asks_all else read_searches(given, self.columns, self.prompt)
        return [self._search(search, source, size, name, hidden) for search in searches]

    def _search(self, search: Search, source: Any, size: tuple[int, int], name: str, hidden: bool) -> Asked:
        """One question of a row of format grounding; `name` is the column of its boxes."""
        text = ", ".join(search.phrases) or self.prompt
        answers: tuple[str, ...] = ()
        box, objects = None, None
        if not hidden:
            found = [
                (one.label, one.field, self._pixels(list(one.numbers), one.field, size)) for one in search.objects
            ]
            for _, field, corners in found:
                try:
                    box_markup(corners, width=size[0], height=size[1])  # refuses a box that is wholly outside
                except InputError as error:
                    raise BadField(field, str(error)) from error
            boxes = [(label, Box(*corners)) for label, _, corners in found]
            answers = (boxes_reply(boxes, *size, NO_OBJECT),)
            if self.task.is_detection:
                named = tuple(NamedBox(label, corners) for label, _, corners in found)
                objects = GoldBoxes(named, len(search.phrases) != 1 or any(label for label, _, _ in found))
            elif len(found) != 1:
                raise BadField(name, _not_one_box(len(found), self.task))
            else:
                box = found[0][2]
        said = asked(self.prompt, search.phrases)
        gold = {"answers": answers, "box": box, "image_size": size, "objects": objects}
        return self._asked(text, [source], {}, said=said, marked=True, **gold)

    def _pixels(self, numbers: list[float], name: str, size: tuple[int, int]) -> Corners:
        width, height = size
        if self.task.box_form is None:  # what the user says may be wrong; what the public data has is known
            box = box_inside(numbers, name, "xywh" if self.box_form == "xywh" else "xyxy", width, height)
            return box.x1, box.y1, box.x2, box.y2
        try:
            if self.box_form == "xyxy_fraction":
                if not all(-0.5 <= number <= 1.5 for number in numbers):
                    raise UserError(f"{numbers} are not fractions of the image")
                numbers = [number * side for number, side in zip(numbers, (width, height) * 2, strict=True)]
            box = Box.from_xywh(*numbers) if self.box_form == "xywh" else Box(*numbers)
        except InputError as error:
            raise BadField(name, str(error)) from error
        return box.x1, box.y1, box.x2, box.y2

    def _images(self, row: Mapping[str, Any]) -> list[Any]:
        column = self.columns["image"]
        fields.field(row, column)
        images = fields.images(row, column)
        if not images:
            raise BadField(column, "holds no image")
        return images

    def _asked(
        self,
        text: str,
        images: list[Any],
        places: Mapping[str, str],
        *,
        said: str | None = None,
        marked: bool = False,
        **gold: Any,
    ) -> Asked:
        """A question; `said` is the filled-in prompt, None fills in `places`."""
        if said is None:
            said = _PLACES.sub(lambda place: places.get(place[1], place[0]), self.prompt)
        flag = {"grounding": True} if marked or self.grounding else {}
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": said, **flag}]
        before: list[Message] = []
        if self.system is not None and self.style == "chat":
            before = [{"role": "system", "content": [{"type": "text", "text": self.system}]}]
        return Asked(text, (*before, {"role": "user", "content": content}), tuple(images), **gold)

    # ---- conversations

    def _conversation(self, row: Mapping[str, Any]) -> Asked:
        row_format = RowFormat(self.task.format, self.columns, text_places=self.text_places)
        [conversation] = row_format.conversations(row, self.image_size)
        name = self.columns[_TURNS[self.task.format]]
        parts = split_last_reply(conversation)
        if parts is None:
            raise BadField(name, "does not end with an assistant's reply, which is the gold answer")
        messages, answer = parts
        if not is_trained(conversation[-1]):
            raise BadField(name, "its last reply, which is the gold answer, is marked as not to be learned")
        if self.box_edge == "clamp":
            messages, answer = boxes_inside(messages, self.grounding), clamp_to_edge(answer)
        if not answer.strip():
            raise BadField(name, "its last reply, which is the gold answer, is blank")
        if not any(message["role"] == "user" for message in messages):
            raise BadField(name, "asks nothing before its last reply")
        sources: list[Any] = []
        question = [without_sources(message, sources, self.grounding) for message in messages]
        text = "".join(part["text"] for part in question[-1]["content"] if part["type"] == "text").strip()
        if self.style == "base":
            question = [self._one_prompt(question, name)]
        box, objects, size = None, None, None
        if self.task.is_grounding:
            if not sources:
                raise BadField(name, "holds no image that its box could be in")
            try:
                size = self.image_size(sources[-1])
            except InputError as error:
                raise BadField(name, str(error)) from error
            boxes = self._gold_boxes(answer, size, name)
            if self.task.is_detection:
                objects = GoldBoxes(boxes, len({one.label for one in boxes}) > 1)
            elif not boxes:
                raise BadField(name, f"its last reply holds no box: {answer[:80]!r}")
            elif len(boxes) > 1:
                raise BadField(name, f"its last reply {_not_one_box(len(boxes), self.task)}")
            else:
                box = boxes[0].box
        return Asked(text, tuple(question), tuple(sources), (answer,), box, size, objects=objects)

    def _gold_boxes(self, answer: str, size: tuple[int, int], name: str) -> tuple[NamedBox, ...]:
        """The boxes of a conversation's last reply; all of its markup must be read where all of them count."""
        if not self.task.is_detection:
            return reply_boxes(answer, size, quads=False)
        # A box that is wrong by 1000 alone is right: as 999, it is the same to a thousandth.
        problems = parse_grounding(clamp_to_edge(answer)).problems
        if problems:
            reasons = "; ".join(problem.reason for problem in problems[:5])
            raise BadField(name, f"its last reply has malformed grounding markup: {reasons}")
        return reply_boxes(answer, size)

    def _one_prompt(self, asked: list[Message], name: str) -> Message:
        if len(asked) != 1:
            raise BadField(name, "has several turns, and a base model takes a single question; use style chat")
        ending = {"text": "", "grounding": True} if self.task.is_grounding else {"text": " Answer:"}
        return {**asked[0], "content": [*asked[0]["content"], {"type": "text", **ending}]}


def _not_one_box(count: int, task: Task) -> str:
    held = f"holds {count} boxes" if count else "holds no box"
    return f"{held}, and metric {task.metric} compares one: use metric detection, which matches all of them"


def without_sources(message: Mapping[str, Any], sources: list[Any], grounding: bool = False) -> Message:
    """The message with the sources of its images moved to `sources`, and its grounding flag moved to its parts."""
    flag = {"grounding": True} if grounding or message.get("grounding") else {}
    kept = []
    for part in content_parts(message):
        if part["type"] == "image":
            sources.append(part["image"])
            kept.append({key: value for key, value in part.items() if key != "image"})
        else:
            kept.append({**part, **flag})
    return {"role": message["role"], "content": kept}
