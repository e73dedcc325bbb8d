"""The tasks that a model is evaluated on: the columns of their data, their prompts and their metrics.

    task = find_task("chartqa")
    questions = Questions(source, task, style="chat")
    scores = task.score_all(questions, replies)

A task is data: `questions.py` reads its rows, `metrics` scores its replies. Columns are those on the cards of the
public datasets; prompts, lengths and metrics are those of Qwen-VL's published evaluation.
"""

from collections.abc import Mapping
from dataclasses import replace

from finetune.data.formats.names import CONVERSATIONS, FIELDS
from finetune.errors import UserError
from finetune.evaluation.task import BoxForm, Scores, Task
from finetune.recipe.document_fields import DEFAULT_QUESTION
from finetune.recipe.problems import nearest
from finetune.recipe.sections import Evaluate, MetricName

__all__ = ["TASKS", "Scores", "Task", "check_prompt", "custom_task", "find_task", "published_task", "task_of"]

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
        Task(
            "fields", "field_f1", FIELDS, {}, DEFAULT_QUESTION, DEFAULT_QUESTION, 512, _END
        ),  # prompts are those of the sources
    )
}
"""The tasks of public datasets; `custom_task` makes others."""

_CUSTOM: dict[str, Task] = {
    "vqa": _vqa("custom", "exact_match", {}, 100),
    "caption": _captions("custom", {}),
    "grounding": _grounding("custom", "grounding", {}),
    FIELDS: Task("custom", "field_f1", FIELDS, {}, DEFAULT_QUESTION, DEFAULT_QUESTION, 512, _END),
}
_METRIC_FORMATS: dict[MetricName, tuple[str, ...]] = {
    "anls": ("vqa", "caption", *CONVERSATIONS),
    "relaxed_accuracy": ("vqa", "caption", *CONVERSATIONS),
    "vqa_score": ("vqa",),
    "exact_match": ("vqa", "caption", *CONVERSATIONS),
    "multiple_choice": ("vqa",),
    "grounding": ("grounding", *CONVERSATIONS),
    "click": ("grounding", *CONVERSATIONS),
    "detection": ("grounding", *CONVERSATIONS),
    "cider_d": ("vqa", "caption", *CONVERSATIONS),
    "field_f1": (FIELDS,),
}
_LENGTHS = {
    "grounding": 28,
    "click": 28,
    "detection": 512,
    "cider_d": 30,
    "multiple_choice": 10,
    "vqa_score": 10,
    "field_f1": 512,
}


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
        metric: anls, relaxed_accuracy, vqa_score, exact_match, multiple_choice, grounding, click, detection or
            cider_d.
        prompt: for base and chat models, with the placeholder {question} or {phrase} (and {options} for
            multiple_choice); None is the published form. Must be None for conversations. That of detection may have
            no placeholder, to ask for all objects.
        max_new_tokens: most tokens of a reply; None is the published number for such a metric.
        format: vqa, grounding, caption; or messages, qwen_json, llava: conversations, asked up to their last reply,
            which is the gold answer (for grounding and click it has one box, for detection any number).

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
    stop = _END if metric in ("grounding", "click", "detection", "field_f1") else _NEXT_QUESTION
    if metric == "multiple_choice":
        task = replace(TASKS["multiple_choice"], columns={"options": "options"})
    else:
        task = _CUSTOM.get(format) or Task("custom", "exact_match", format, {}, "", "", 100)
    if metric == "detection" and format == "grounding":
        # An open <box> would make every reply one with a box.
        task = replace(task, base_prompt=_REF)
    task = replace(
        task,
        name="custom",
        metric=known,
        max_new_tokens=max_new_tokens or _LENGTHS.get(metric, 100),
        stop=stop,
    )
    if prompt is None:
        return task
    if format in (*CONVERSATIONS, FIELDS):
        raise UserError(f"format {format} has no prompt of the task: its rows or its source bring them")
    check_prompt(task, prompt)
    return replace(task, base_prompt=prompt, chat_prompt=prompt)


_PUBLISHED_CHOICE = "Context: {hint}\nQuestion: {question}\nOptions: {options}\nAnswer:"
_PUBLISHED_FEWEST = {"grounding": 10, "cider_d": 8}  # new tokens; 1 for other metrics


def published_task(task: Task) -> Task:
    """The task as Qwen-VL's published evaluation scripts ask and score it.

    Every model gets raw text, also a chat model. Replies are as long as the scripts let them be and end at
    `<|endoftext|>` alone, without stop texts. Multiple choice takes the likeliest letter. Scores are computed as
    `metrics.published` says. Source: `eval_mm` of the public repository QwenLM/Qwen-VL.

    Raises:
        UserError: the scripts have no such task.
    """
    if task.format in (*CONVERSATIONS, FIELDS) or task.metric in ("click", "detection"):
        what = f"data of format {task.format}" if task.format in (*CONVERSATIONS, FIELDS) else f"metric {task.metric}"
        raise UserError(f"--prompt published: the published scripts have nothing like task {task.name} ({what})")
    task = replace(task, stop=(), published=True)
    if task.by_likelihood:
        return replace(task, base_prompt=_PUBLISHED_CHOICE, chat_prompt=_PUBLISHED_CHOICE, max_new_tokens=1)
    fewest = _PUBLISHED_FEWEST.get(task.metric, 1)
    if task.max_new_tokens < fewest:
        raise UserError(
            f"the published scripts let a reply of task {task.name} have no fewer than {fewest} new tokens: "
            f"{task.max_new_tokens} at most cannot be"
        )
    return replace(task, chat_prompt=task.base_prompt, min_new_tokens=fewest)


def check_prompt(task: Task, prompt: str) -> None:
    """Refuse a prompt without the placeholders of its task.

    Raises:
        UserError: a placeholder is missing, or the prompt is blank.
    """
    missing = missing_in(task, prompt)
    if missing or not prompt.strip():
        raise UserError(f"the prompt of task {task.name} must hold {' and '.join(missing) or 'text'}: {prompt!r}")


def missing_in(task: Task, prompt: str) -> list[str]:
    """The placeholders of the task that a prompt lacks."""
    needed = {"vqa": ["{question}"], "grounding": ["{phrase}"]}.get(task.format, [])
    if task.is_detection:
        needed = []
    if task.metric == "multiple_choice":
        needed = [*needed, "{options}"]
    return [placeholder for placeholder in needed if placeholder not in prompt]


def task_of(evaluate: Evaluate) -> Task:
    """The task of a recipe's `evaluate` section, with its `max_new_tokens`.

    Raises:
        UserError: no task, or a metric that does not go with the format of the data.
    """
    if evaluate.task is None:
        raise UserError("the evaluate section names no task: set evaluate.task")
    if evaluate.task == "fields" and "max_new_tokens" not in evaluate.model_fields_set:
        return find_task("fields")
    if evaluate.task == "custom":
        assert evaluate.metric is not None, "the section refuses task custom without a metric"
        return custom_task(evaluate.metric, max_new_tokens=evaluate.max_new_tokens, format=evaluate.data[0].format)
    return replace(find_task(evaluate.task), max_new_tokens=evaluate.max_new_tokens)
