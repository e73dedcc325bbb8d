"""The tasks that a model is evaluated on: the columns of their data, their prompts and their metrics.

    task = find_task("chartqa")
    questions = Questions(source, task, style="chat")
    scores = task.score_all(questions, replies)

A task is data: `questions.py` reads its rows, `metrics` scores its replies. Columns are those on the cards of the
public datasets; prompts, lengths and metrics are those of Qwen-VL's published evaluation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from finetune.data.formats.names import CONVERSATIONS
from finetune.errors import UserError
from finetune.metrics import (
    anls,
    cider_d,
    click_accuracy,
    exact_match,
    grounding_accuracy,
    multiple_choice_accuracy,
    ptb_tokens,
    relaxed_accuracy,
    vqa_score,
)
from finetune.metrics.vqa import FEWEST_ANSWERS
from finetune.recipe.problems import nearest
from finetune.recipe.sections import Evaluate, MetricName
from finetune.replies.task_replies import Style, answer_of

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
        max_new_tokens: most tokens of a reply.
        stop: texts at which the reply of a base model is cut, since it may continue with a next question.
        box_form: for format grounding. "xyxy" and "xywh" are pixels, "xyxy_fraction" corners as fractions of the
            image. None: the source has it.
        group_names: value in the data -> name of the group, for values that are not names.
        mean_of_groups: the score is the mean of the groups' means, not of all questions; every row needs a group.
        shortens: cut a sentence down to the thing that it names before comparing (see `task_replies.shortened`).
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

    @property
    def fewest_answers(self) -> int:
        """Gold answers a question must have for the metric to mean something."""
        return FEWEST_ANSWERS if self.metric == "vqa_score" else 1

    @property
    def is_grounding(self) -> bool:
        """Whether replies are boxes."""
        return self.metric in ("grounding", "click")

    def prompt(self, style: Style) -> str:
        return self.chat_prompt if style == "chat" else self.base_prompt

    def extract(self, reply: str, style: Style = "chat") -> str:
        """The answer in a reply; an answer by itself is unchanged."""
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
                return max(relaxed_accuracy(answer, gold) for gold in question.answers)
            case "vqa_score":
                return vqa_score(answer, question.answers)
            case "exact_match":
                return exact_match(answer, question.answers)
            case "multiple_choice":
                return multiple_choice_accuracy(answer, question.answers[0], question.options)
            case "grounding":
                return grounding_accuracy(answer, *_gold_box(question))
            case "click":
                return click_accuracy(answer, *_gold_box(question))
        raise UserError(f"{self.metric} is not the score of one reply: use score_all")

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


def _gold_box(question: "Question") -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    assert question.box is not None and question.image_size is not None, "answers of grounding come with their box"
    return question.box, question.image_size


_NEXT_QUESTION = ("<|endoftext|>", "<img>", "\n", "Question:")
_END = ("<|endoftext|>",)
_ASK, _ANSWER = "{question}", "{question} Answer:"
_CAPTION = "Describe the image in English:"
_REF, _REF_BOX = "<ref>{phrase}</ref>", "<ref>{phrase}</ref><box>"


def _vqa(name: str, metric: MetricName, columns: Mapping[str, str], max_new_tokens: int) -> Task:
    return Task(name, metric, "vqa", columns, _ANSWER, _ASK, max_new_tokens, _NEXT_QUESTION)


def _grounding(name: str, metric: MetricName, columns: Mapping[str, str], box_form: BoxForm | None = None) -> Task:
    return Task(name, metric, "grounding", columns, _REF_BOX, _REF, 28, _END, box_form)


def _captions(name: str, columns: Mapping[str, str]) -> Task:
    return Task(name, "cider_d", "caption", columns, _CAPTION, _CAPTION, 30, _NEXT_QUESTION)


_REFCOCO = {"phrase": "answer", "box": "bbox", "id": "question_id"}  # lmms-lab/RefCOCO, RefCOCOplus, RefCOCOg
_DOCVQA = {"id": "questionId"}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _vqa("docvqa", "anls", _DOCVQA, 100),  # HuggingFaceM4/DocumentVQA; lmms-lab/DocVQA, config DocVQA
        _vqa("infographicvqa", "anls", _DOCVQA, 100),  # lmms-lab/DocVQA, config InfographicVQA
        replace(
            _vqa(
                "chartqa",  # HuggingFaceM4/ChartQA
                "relaxed_accuracy",
                {"question": "query", "answers": "label", "group": "human_or_machine"},
                100,
            ),
            group_names={"0": "human", "1": "augmented"},
            mean_of_groups=True,
        ),
        _vqa("textvqa", "vqa_score", {"id": "question_id"}, 10),  # lmms-lab/textvqa
        _vqa("vqav2", "vqa_score", {"id": "question_id"}, 10),  # lmms-lab/VQAv2
        _vqa("ocrvqa", "exact_match", {"question": "questions"}, 100),  # howard-hou/OCR-VQA
        # lmms-lab/GQA keeps its images in a separate config: join them by imageId first.
        replace(_vqa("gqa", "exact_match", {"answers": "answer", "id": "id"}, 10), shortens=True),
        _grounding("refcoco", "grounding", _REFCOCO, box_form="xywh"),
        _grounding("refcoco+", "grounding", _REFCOCO, box_form="xywh"),
        _grounding("refcocog", "grounding", _REFCOCO, box_form="xywh"),
        _captions("flickr30k", {}),  # umaru97/flickr30k_train_val_test
        _captions("nocaps", {"caption": "annotations_captions", "id": "image_id"}),  # lmms-lab/NoCaps
        _grounding(
            "screenspot",  # rootsautomation/ScreenSpot
            "click",
            {"phrase": "instruction", "box": "bbox", "group": "data_type"},
            box_form="xyxy_fraction",
        ),
        Task(
            "multiple_choice",  # lmms-lab/ai2d; answers are option numbers from 0, letters, or an option's text
            "multiple_choice",
            "vqa",
            {"answers": "answer", "options": "options"},
            "Question: {question}\nOptions: {options}\nAnswer:",
            "{question}\n{options}\nAnswer with the letter of the right option.",
            10,
            _NEXT_QUESTION,
        ),
    )
}
"""The tasks of public datasets; `custom_task` makes others."""

_CUSTOM: dict[str, Task] = {
    "vqa": _vqa("custom", "exact_match", {}, 100),
    "caption": _captions("custom", {}),
    "grounding": _grounding("custom", "grounding", {}),
}
_METRIC_FORMATS: dict[MetricName, tuple[str, ...]] = {
    "anls": ("vqa", "caption", *CONVERSATIONS),
    "relaxed_accuracy": ("vqa", "caption", *CONVERSATIONS),
    "vqa_score": ("vqa",),
    "exact_match": ("vqa", "caption", *CONVERSATIONS),
    "multiple_choice": ("vqa",),
    "grounding": ("grounding", *CONVERSATIONS),
    "click": ("grounding", *CONVERSATIONS),
    "cider_d": ("vqa", "caption", *CONVERSATIONS),
}
_LENGTHS = {"grounding": 28, "click": 28, "cider_d": 30, "multiple_choice": 10, "vqa_score": 10}


def find_task(name: str) -> Task:
    """The task with this name.

    Raises:
        UserError: there is none; the message has the nearest names.
    """
    if name in TASKS:
        return TASKS[name]
    meant = nearest(name.lower(), list(TASKS))
    said = f"did you mean {' or '.join(meant)}? " if meant else ""
    raise UserError(
        f"there is no task {name!r}; {said}The tasks are {', '.join(TASKS)}, and custom for data of your own"
    )


def custom_task(
    metric: str, prompt: str | None = None, max_new_tokens: int | None = None, format: str = "vqa"
) -> Task:
    """A task on the user's own data.

    Args:
        metric: anls, relaxed_accuracy, vqa_score, exact_match, multiple_choice, grounding, click or cider_d.
        prompt: for base and chat models, with the placeholder {question} or {phrase} (and {options} for
            multiple_choice); None is the published form. Must be None for conversations.
        max_new_tokens: most tokens of a reply; None is the published number for such a metric.
        format: vqa, grounding, caption; or messages, qwen_json, llava: conversations, asked up to their last reply,
            which is the gold answer (its first box for grounding and click).

    Raises:
        UserError: an unknown metric or format, a metric that does not go with the format, or a prompt without its
            placeholder.
    """
    known = next((name for name in _METRIC_FORMATS if name == metric), None)
    if known is None:
        meant = nearest(metric, list(_METRIC_FORMATS))
        said = f"did you mean {' or '.join(meant)}? " if meant else ""
        raise UserError(f"metric {metric!r} is unknown; {said}The metrics are {', '.join(_METRIC_FORMATS)}")
    if format not in (*_CUSTOM, *CONVERSATIONS):
        raise UserError(f"format must be one of {', '.join((*_CUSTOM, *CONVERSATIONS))}, not {format!r}")
    if format not in _METRIC_FORMATS[known]:
        raise UserError(f"metric {metric} needs data of format {', '.join(_METRIC_FORMATS[known])}, not {format}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    stop = _END if metric in ("grounding", "click") else _NEXT_QUESTION
    if metric == "multiple_choice":
        task = replace(TASKS["multiple_choice"], columns={"options": "options"})
    else:
        task = _CUSTOM.get(format) or Task("custom", "exact_match", format, {}, "", "", 100)
    task = replace(
        task,
        name="custom",
        metric=known,
        max_new_tokens=max_new_tokens or _LENGTHS.get(metric, 100),
        stop=stop,
    )
    if prompt is None:
        return task
    if format in CONVERSATIONS:
        raise UserError(f"format {format} has no prompt: its rows hold the user's messages")
    check_prompt(task, prompt)
    return replace(task, base_prompt=prompt, chat_prompt=prompt)


def check_prompt(task: Task, prompt: str) -> None:
    """Refuse a prompt without the placeholders of its task.

    Raises:
        UserError: a placeholder is missing, or the prompt is blank.
    """
    needed = {"vqa": ["{question}"], "grounding": ["{phrase}"]}.get(task.format, [])
    if task.metric == "multiple_choice":
        needed = [*needed, "{options}"]
    missing = [placeholder for placeholder in needed if placeholder not in prompt]
    if missing or not prompt.strip():
        raise UserError(f"the prompt of task {task.name} must hold {' and '.join(missing) or 'text'}: {prompt!r}")


def task_of(evaluate: Evaluate) -> Task:
    """The task of a recipe's `evaluate` section, with its `max_new_tokens`.

    Raises:
        UserError: no task, or a metric that does not go with the format of the data.
    """
    if evaluate.task is None:
        raise UserError("the evaluate section names no task: set evaluate.task")
    if evaluate.task == "custom":
        assert evaluate.metric is not None, "the section refuses task custom without a metric"
        return custom_task(evaluate.metric, max_new_tokens=evaluate.max_new_tokens, format=evaluate.data[0].format)
    return replace(find_task(evaluate.task), max_new_tokens=evaluate.max_new_tokens)
