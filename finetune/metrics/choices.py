"""Accuracy on multiple-choice questions: which option a reply chose (AI2D, ScienceQA)."""

import re
from collections.abc import Iterator, Sequence

from finetune.metrics.choice_forms import CHOSEN, FIRST, ITEM, LEAD_IN, MARKED, OR, STATED, WRONG
from finetune.metrics.text_form import composed

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
READ_CHARACTERS = 4000
"""A choice is looked for in so much of a reply."""


def choice_letter(prediction: str, options: int) -> str | None:
    """The letter that a reply chose, upper-case; None if it names none of the options, or several.

    A letter counts if it is alone, or first and followed by punctuation (`B.`, `(B)`, `B、猫`), or if words say that
    it is the answer (`The answer is B`, `答案是B`) or chosen (`Option B`, `选B`): see `choice_forms`. The "A" of "A
    dog" is an article. Of a reply that states its answer, the rest is explanation; "A or B" and a list of all options
    choose none.

    Args:
        prediction: the reply.
        options: the number of options; later letters are ignored.
    """
    reply = composed(prediction[:READ_CHARACTERS], "NFKC")
    for found in (_stated(reply, STATED, options), _first(reply, options), _stated(reply, CHOSEN, options)):
        if found:
            return next(iter(found)) if len(found) == 1 else None
    marked = {match[1] for match in MARKED.finditer(reply) if _is_option(match[1], options)}
    return marked.pop() if len(marked) == 1 else None


def read_choice(prediction: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reply chose, by its whole text or its letter; None if that cannot be told.

    Args:
        prediction: the reply.
        options: the texts of all options.
    """
    # The text is compared first: an option may itself be "B." or "(a)".
    texts = [prediction]
    if lead_in := LEAD_IN.match(composed(prediction[:READ_CHARACTERS], "NFKC")):
        texts.append(composed(prediction[:READ_CHARACTERS], "NFKC")[lead_in.end() :])
    for text in texts:
        for form in (_plain, _plainest):
            said = form(text)
            chosen = [LETTERS[place] for place, option in enumerate(options) if said and form(option) == said]
            if len(chosen) == 1:
                return chosen[0]
    return choice_letter(prediction, len(options))


def multiple_choice_accuracy(prediction: str, gold: str, options: Sequence[str]) -> float:
    """1.0 if the reply chose the gold option, by its letter or by its whole text; see `read_choice`.

    Args:
        prediction: the reply.
        gold: the letter of the right option.
        options: the texts of all options.

    Raises:
        ValueError: `gold` is not the letter of an option.
    """
    if len(gold) != 1 or gold not in LETTERS[: len(options)]:
        raise ValueError(f"gold must be one of {LETTERS[: len(options)]}, not {gold!r}")
    return float(read_choice(prediction, options) == gold)


def _stated(reply: str, form: re.Pattern[str], options: int) -> set[str]:
    """The options that the reply names in one form; all that it joins by "or" or "and"."""
    found: set[str] = set()
    for match in form.finditer(reply):
        letter = match["letter"].upper()
        if _is_option(letter, options) and not WRONG.match(reply, match.end("letter")):
            found |= {letter, *_joined(reply, match.end("letter"), options)}
    return found


def _first(reply: str, options: int) -> set[str]:
    """The option at the beginning of the reply, with others that are joined to it or listed after it."""
    match = FIRST.match(reply)
    if match is None:
        return set()
    letter = match["letter"].upper()
    if not _is_option(letter, options) or WRONG.match(reply, match.end("letter")):
        return set()
    listed = {item[1] for item in ITEM.finditer(reply) if _is_option(item[1], options)}
    return {letter, *listed, *_joined(reply, match.end("letter"), options)}


def _joined(reply: str, end: int, options: int) -> Iterator[str]:
    """The letters of "A, B or C" after the first, which ends at `end`."""
    while match := OR.match(reply, end):
        assert match.lastgroup is not None, "one of the two letters is there"
        if not _is_option(match[match.lastgroup], options):
            return
        yield match[match.lastgroup]
        end = match.end(match.lastgroup)


def _is_option(letter: str, options: int) -> bool:
    return letter in LETTERS[:options]


def _plain(text: str) -> str:
    return " ".join(composed(text).casefold().split()).rstrip(".。")


def _plainest(text: str) -> str:
    """In compatible form too, and without the quotes or the bold type around it."""
    return _plain(composed(text, "NFKC").strip(" \n\"'“”‘’「」*_`"))
