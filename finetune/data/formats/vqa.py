"""Format `vqa`: an image, a question and its answers in columns.

    {"image": ..., "question": "What is the total?", "answers": ["$ 12.40", "12.40"]}

The target is the most common answer, and the first of several that are equally common: if the answers are variants of
one another (DocVQA) that is the first, if ten people answered (TextVQA) the majority's. With a list of questions and a
list of answers of the same length (OCR-VQA), each pair becomes a sample.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.formats.messages import Message
from finetune.data.sample import BadField

COLUMNS = ("image", "question", "answers")
PLACEHOLDER = "{question}"


def vqa(row: Mapping[str, Any], columns: Mapping[str, str], prompt: str = PLACEHOLDER) -> list[list[Message]]:
    """One conversation for each question.

    Args:
        row, columns: `answers` may also be named `answer`.
        prompt: the user's text; `{question}` stands for the question.

    Raises:
        BadField: no image, question or answer, or lists of different lengths.
    """
    image = fields.image(fields.field(row, columns["image"]), columns["image"])
    name = columns["question"]
    questions = fields.field(row, name)
    answers_name = columns["answers"]
    if answers_name == "answers" and row.get("answers") is None and row.get("answer") is not None:
        answers_name = "answer"
    answers = fields.field(row, answers_name)
    if isinstance(questions, str):
        pairs = [(name, fields.one_text(questions, name), answers_name, answers)]
    else:
        pairs = _pairs(name, questions, answers_name, answers)
    conversations = []
    for question_name, question, answer_name, answer in pairs:
        asked = prompt.replace(PLACEHOLDER, fields.text(question, question_name))
        conversations.append(question_and_answer(image, asked, _target(answer, answer_name)))
    return conversations


def question_and_answer(image: Any, question: str, answer: str, *, grounding: bool = False) -> list[Message]:
    """A conversation of one image, one question and its answer."""
    flag = {"grounding": True} if grounding else {}
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content, **flag}, {"role": "assistant", "content": answer, **flag}]


def _pairs(name: str, questions: Any, answers_name: str, answers: Any) -> list[tuple[str, Any, str, Any]]:
    if not isinstance(questions, list | tuple):
        raise BadField(name, f"must be text or a list of texts, not {type(questions).__name__}")
    if not questions:
        raise BadField(name, "is empty")
    if not isinstance(answers, list | tuple) or len(answers) != len(questions):
        given = f"{len(answers)}" if isinstance(answers, list | tuple) else type(answers).__name__
        raise BadField(answers_name, f"must be a list of {len(questions)}, one for each question, not {given}")
    return [
        (f"{name}[{index}]", question, f"{answers_name}[{index}]", answer)
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]


def _target(answers: Any, name: str) -> str:
    if not isinstance(answers, list | tuple):
        return fields.one_text(answers, name)
    for index, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise BadField(f"{name}[{index}]", f"must be text, not {type(answer).__name__}")
    given = Counter(answer for answer in answers if answer.strip())
    if not given:
        raise BadField(name, "holds no answer (the answers of public test splits are hidden)")
    return given.most_common(1)[0][0]
