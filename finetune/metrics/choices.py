"""Accuracy on multiple-choice questions: which option a reply chose (AI2D, ScienceQA)."""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# "B", "(B)", "B.", "B) the dog", "**B**: the dog": at the beginning, alone or followed by punctuation.
_FIRST = re.compile(r"\W*([A-Za-z])(?:\s*[.):\]*]|\s*$|\s*\n)")
# "The answer is B", "Answer: (B)", "option B"; a lower-case letter only if no word follows: "the answer is a dog".
_NAMED = re.compile(
    r"\b(?i:answer|option|choice|choose)\b(?:\s+is)?\s*:?\s*\W{0,3}([A-Z](?![\w'])|[a-z](?=\s*(?:[.,;:)\]*]|$)))"
)


def choice_letter(prediction: str, options: int) -> str | None:
    """The letter that a reply chose, upper-case; None if it names none of the options.

    A letter counts if it is alone, or first and followed by punctuation (`B.`, `(B)`, `B: the dog`), or after
    "answer", "option" or "choice". The "A" of "A dog" is an article.

    Args:
        prediction: the reply.
        options: the number of options; later letters are ignored.
    """
    first = _FIRST.match(prediction)
    for match in [*([first] if first else []), *_NAMED.finditer(prediction)]:
        letter = match[1].upper()
        if LETTERS.index(letter) < options:
            return letter
    return None


def multiple_choice_accuracy(prediction: str, gold: str, options: Sequence[str]) -> float:
    """1.0 if the reply chose the gold option, by its letter or by its whole text.

    Args:
        prediction: the reply.
        gold: the letter of the right option.
        options: the texts of all options.

    Raises:
        ValueError: `gold` is not the letter of an option.
    """
    if len(gold) != 1 or gold not in LETTERS[: len(options)]:
        raise ValueError(f"gold must be one of {LETTERS[: len(options)]}, not {gold!r}")
    # The text is compared first: an option may itself be "B." or "(a)".
    reply = _plain(prediction)
    chosen = [LETTERS[place] for place, option in enumerate(options) if _plain(option) == reply]
    letter = chosen[0] if len(chosen) == 1 else choice_letter(prediction, len(options))
    return float(letter == gold)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
