"""What a task is: how its data is read, how it is asked, and what its score is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from finetune.errors import UserError
from finetune.metrics import (
    anls,
    cider_d,
    click_accuracy,
    exact_match,
    first_box,
    grounding_accuracy,
    multiple_choice_accuracy,
    ptb_tokens,
    read_choice,
    relaxed_accuracy,
    vqa_score,
)
from finetune.metrics.answers import as_number
from finetune.metrics.boxes import IOU_THRESHOLD, as_markup, box_iou
from finetune.metrics.detection import GoldBoxes, Matched, match_boxes, reply_boxes
from finetune.metrics.document_fields import FieldsAsked, read_json_object, score_fields
from finetune.metrics.published import published_box, published_gqa_answer, published_grounding_accuracy
from finetune.metrics.vqa import FEWEST_ANSWERS, can_match
from finetune.recipe.sections import MetricName
from finetune.replies.task_replies import Style, answer_of, without_tags

if TYPE_CHECKING:
    from finetune.evaluation.question import Question

BoxForm = Literal["xyxy", "xywh", "xyxy_fraction"]


@dataclass(frozen=True)
class Scores:
    """The scores of the replies to a task's questions.

    Attributes:
        metric: scores are in [0, 1]; those of cider_d in [0, 10].
        values: the score of each question, in their order.
        total: the task's score; see `Task.aggregate`.
        groups: the mean of each group of questions, by name; empty where the data has none.
    """

    metric: str
    values: list[float]
    total: float
    groups: dict[str, float]


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes:
        name: as in `--task` and `evaluate.task`.
        metric: the reported score.
        format: of its rows: "vqa", "grounding" or "caption" have a column for each role; or one of the conversations.
        columns: role -> the column's name in the public data; a role that is missing here is its own name. In addition
            to the roles of the format there may be `id` (of the question), `group` and `options`.
        base_prompt, chat_prompt: for a base and a chat model; `{question}` (vqa), `{phrase}` (grounding) and
            `{options}` are replaced by the row's texts. Empty for conversations.
        max_new_tokens, min_new_tokens: most and fewest tokens of a reply.
        stop: texts at which the reply of a base model is cut, since it may continue with a next question.
        box_form: for format grounding. "xyxy" and "xywh" are pixels, "xyxy_fraction" corners as fractions of the
            image. None: the source has it.
        group_names: value in the data -> name of the group, for values that are not names.
        mean_of_groups: the score is the mean of the groups' means, not of all questions; every row needs a group.
        shortens: cut a sentence down to the thing that it names before comparing (see `task_replies.shortened`).
        published: ask in raw text and score as the published scripts do, see `published_task`.
    """

    name: str
    metric: MetricName
    format: str
    columns: Mapping[str, str]
    base_prompt: str
    chat_prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    box_form: BoxForm | None = None
    group_names: Mapping[str, str] = field(default_factory=dict)
    mean_of_groups: bool = False
    shortens: bool = False
    min_new_tokens: int = 0
    published: bool = False

    @property
    def fewest_answers(self) -> int:
        """Gold answers a question must have for the metric to mean something."""
        return FEWEST_ANSWERS if self.metric == "vqa_score" else 1

    @property
    def is_grounding(self) -> bool:
        """Whether replies are boxes."""
        return self.metric in ("grounding", "click", "detection")

    @property
    def is_detection(self) -> bool:
        """Whether all boxes of a reply count, and not the first alone."""
        return self.metric == "detection"

    @property
    def reads_fields(self) -> bool:
        """Whether replies are fields of documents."""
        return self.metric == "field_f1"

    @property
    def by_likelihood(self) -> bool:
        """Whether the reply is the likeliest of the options' letters, and nothing is generated freely."""
        return self.published and self.metric == "multiple_choice"

    def prompt(self, style: Style) -> str:
        return self.chat_prompt if style == "chat" else self.base_prompt

    def extract(self, reply: str, style: Style = "chat") -> str:
        """The answer in a reply; an answer by itself is unchanged."""
        if self.published:
            answer = without_tags(reply).strip()
            return published_gqa_answer(answer) if self.shortens else answer
        stop = self.stop if style == "base" else ()
        return answer_of(reply, stop=stop, keeps_markup=self.is_grounding, shortens=self.shortens)

    def score(self, question: "Question", reply: str) -> float:
        """The score of one reply.

        Raises:
            UserError: the question's answer is hidden, or the metric looks at all replies at once (cider_d).
        """
        if not question.answers:
            raise UserError(f"{question.id}: its answer is hidden; nothing can be scored")
        answer = self.extract(reply, question.style)
        match self.metric:
            case "anls":
                return anls(answer, question.answers)
            case "relaxed_accuracy":
                return max(relaxed_accuracy(answer, gold, self.published) for gold in question.answers)
            case "vqa_score":
                return vqa_score(answer, question.answers)
            case "exact_match":
                return exact_match(answer, question.answers)
            case "multiple_choice":
                return multiple_choice_accuracy(answer, question.answers[0], question.options)
            case "grounding" if self.published:
                return published_grounding_accuracy(answer, *_gold_box(question))
            case "grounding":
                return grounding_accuracy(answer, *_gold_box(question))
            case "click":
                return click_accuracy(answer, *_gold_box(question))
            case "detection":
                return self.matched(question, reply).counts.f1
            case "field_f1":
                return score_fields(answer, _fields_of(question), compare_trees=False).f1
        raise UserError(f"{self.metric} is not the score of one reply: use score_all")

    def matched(self, question: "Question", reply: str) -> Matched:
        """The boxes of a reply against all gold boxes, for detection."""
        gold, size = _gold_boxes(question)
        return match_boxes(reply_boxes(self.extract(reply, question.style), size), gold)

    def unread(self, question: "Question", reply: str) -> str | None:
        """Why a reply could not be read as an answer, so that it counts as wrong whatever it means; None if it was."""
        answer = self.extract(reply, question.style)
        if self.is_detection:  # where nothing is to be found, an empty reply is right
            return "hold box markup that cannot be read" if _is_unreadable(answer) else None
        if not answer.strip():
            return "are empty"
        match self.metric:
            case "field_f1" if _fields_of(question).is_json and read_json_object(answer) is None:
                return "hold no JSON object"
            case "multiple_choice" if read_choice(answer, question.options) is None:
                return "choose none of the options, or several"
            case "grounding" if self.published and published_box(answer, (1, 1)) is None:
                return "hold no box"
            case "grounding" | "click" if not self.published and first_box(answer, (1, 1)) is None:
                return "hold no box"
            case "relaxed_accuracy" if question.answers and as_number(answer) is None:
                if all(as_number(gold.strip()) is not None for gold in question.answers):
                    return "are no number, where the answer is one"
        return None

    def score_all(self, questions: "Sequence[Question]", replies: Sequence[str]) -> Scores:
        """The scores of the replies to all questions.

        Raises:
            UserError: hidden answers, no questions, or different numbers of questions and replies.
        """
        if len(questions) != len(replies):
            raise UserError(f"{len(replies)} replies to {len(questions)} questions")
        if not replies:
            raise UserError("there are no questions to score")
        groups = []
        if self.metric == "cider_d":
            captions, references = [], []
            for question, reply in zip(questions, replies, strict=True):
                if not question.answers:
                    raise UserError(f"{question.id}: its captions are hidden; nothing can be scored")
                captions.append(ptb_tokens(self.extract(reply, question.style)))
                references.append([ptb_tokens(answer) for answer in question.answers])
                groups.append(question.group)
            _, values = cider_d(captions, references)
        else:
            values = []
            for question, reply in zip(questions, replies, strict=True):
                values.append(self.score(question, reply))
                groups.append(question.group)
        return self._scores(values, groups)

    def notes(self, questions: "Sequence[Question]") -> list[str]:
        """What a reader of the score should know about the questions: those that no reply can get right, and why."""
        if self.metric == "cider_d":
            alone = (
                "cider_d is 0 whatever is said: words are weighed by how few images have them, and this is one image"
            )
            return [alone] if len(questions) == 1 else []
        if self.metric == "vqa_score":
            count = sum(bool(question.answers) and not can_match(question.answers) for question in questions)
            why = (
                "cannot be answered right: vqa_score compares with answers in lower case, without articles, and "
                "theirs are not; exact_match or anls take them as they are"
            )
            return [f"{count:,} questions {why}"] if count else []
        if not self.is_grounding:
            return []
        if self.metric == "click":
            return []
        missed = sum(any(_cannot_match(*boxed) for boxed in _each_gold_box(question)) for question in questions)
        why = "have a gold box that no reply can match: it has no area, or most of it is outside the image"
        return [f"{missed:,} questions {why}"] if missed else []

    def aggregate(self, values: np.ndarray, groups: np.ndarray | None = None) -> float:
        """The task's score from those of its questions: their mean, or the mean of the groups' means.

        Args:
            values: (questions,) scores.
            groups: (questions,) names; needed where the score is a mean of groups.

        Raises:
            UserError: no values, or no groups where they are needed.
        """
        values = np.asarray(values, dtype=np.float64)
        if not values.size:
            raise UserError("there are no questions to score")
        if not self.mean_of_groups:
            return float(values.mean())
        if groups is None:
            raise UserError(f"the score of {self.name} is a mean of groups: give the group of each question")
        _, members = np.unique(np.asarray(groups).astype(str), return_inverse=True)
        return float((np.bincount(members, values) / np.bincount(members)).mean())

    def _scores(self, values: list[float], groups: list[str | None]) -> Scores:
        members: dict[str, list[float]] = {}
        for value, group in zip(values, groups, strict=True):
            if group is not None:
                members.setdefault(group, []).append(value)
        means = {group: sum(scores) / len(scores) for group, scores in sorted(members.items())}
        return Scores(self.metric, values, self.aggregate(np.array(values), np.array(groups)), means)


def _fields_of(question: "Question") -> FieldsAsked:
    assert question.fields is not None, "questions of a task of fields come with them"
    return question.fields


def _gold_box(question: "Question") -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    assert question.box is not None and question.image_size is not None, "answers of grounding come with their box"
    return question.box, question.image_size


def _gold_boxes(question: "Question") -> tuple[GoldBoxes, tuple[int, int]]:
    assert question.objects is not None and question.image_size is not None, "answers of detection come with boxes"
    return question.objects, question.image_size


def _each_gold_box(question: "Question") -> list[tuple[tuple[float, float, float, float], tuple[int, int]]]:
    if question.objects is not None:
        objects, size = _gold_boxes(question)
        return [(one.box, size) for one in objects.boxes]
    return [] if question.box is None else [_gold_box(question)]


def _cannot_match(box: tuple[float, float, float, float], size: tuple[int, int]) -> bool:
    return box_iou(box, within(box, size)) < IOU_THRESHOLD


def _is_unreadable(answer: str) -> bool:
    """Whether a reply has the markup of boxes, and a part of it cannot be read."""
    from qwenvl.text.grounding import parse_grounding  # costs seconds to import

    return any(not problem.repaired for problem in parse_grounding(as_markup(answer)).problems)


def within(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a box that is inside an image of this width and height."""
    width, height = size
    x1, y1, x2, y2 = box
    return min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)
