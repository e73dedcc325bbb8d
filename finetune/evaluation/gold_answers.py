"""Gold answers of a row as its columns hold them: hidden ones, lists of several people's, and letters of options."""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats import fields
from finetune.data.sample import BadField
from finetune.metrics.choices import LETTERS, choice_letter
from finetune.metrics.text_form import composed


def may_be_hidden(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, None where it is hidden; the column itself must exist."""
    if column not in row:
        there = ", ".join(map(str, row))
        raise BadField(
            column,
            f"is missing; the row has {there[:200] or 'nothing'}. Name the column under `columns`, or give it as null "
            "where answers are hidden",
        )
    return row[column]


def gold_answers(value: Any, name: str) -> tuple[str, ...]:
    """Gold answers; none where the value is None, an empty list or all blank, as in hidden test splits."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        value = [fields.one_text(value, name) if isinstance(value, str) and value.strip() else value]
    answers = []
    for index, item in enumerate(value):
        # VQAv2 has {"answer", "answer_confidence", "answer_id"}.
        answer = item.get("answer") if isinstance(item, Mapping) else item
        if not isinstance(answer, str):
            raise BadField(name if len(value) == 1 else f"{name}[{index}]", f"must be text, not {kind_of(answer)}")
        answers.append(answer)
    return tuple(answers) if any(answer.strip() for answer in answers) else ()


def gold_letter(answer: Any, options: tuple[str, ...], name: str, task: str) -> str:
    """The letter of the right option, given as its number from 0, its letter or its text."""
    if isinstance(answer, str):
        answer = composed(answer).strip()
        texts = [composed(option).strip() for option in options]
        if answer.isdecimal():
            # In AI2D "2" is the third option, even where the options themselves are numbers. Other data may mean the
            # option "2".
            if task == "custom" and answer in texts and texts.index(answer) != int(answer):
                raise BadField(
                    name,
                    f"is {answer!r}, the text of one option and the number (from 0) of another: write the letter of "
                    "the right option, or its number without quotes",
                )
            answer = int(answer)
        elif texts.count(answer) == 1:
            return LETTERS[texts.index(answer)]
        elif texts.count(answer) > 1:
            raise BadField(name, f"is {answer!r}, the text of several options: write the letter of the right one")
        elif (letter := choice_letter(answer, len(options))) is not None:
            return letter
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return LETTERS[answer]
    raise BadField(
        name, f"must be a number from 0 to {len(options) - 1}, a letter or an option's text, not {answer!r}"
    )


def kind_of(value: Any) -> str:
    """What messages call a value: its type, or the length of a list."""
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else type(value).__name__
