"""The answer in a model's reply."""

import re
from collections.abc import Sequence
from typing import Literal

Style = Literal["chat", "base"]
"""How a model is asked: in ChatML, or in raw text that a base model continues."""

_TURN_ENDS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
_MARKUP = re.compile("<(?:ref|box|quad)>")
_TAGS = re.compile("</?(?:ref|box|quad)>")
_LEAD_IN = re.compile(r"\b(?:is|are|a|an|the)\s+")


def answer_of(reply: str, *, stop: Sequence[str] = (), keeps_markup: bool = False, shortens: bool = False) -> str:
    """The answer in a reply, without the text around it; an answer by itself is unchanged.

    Args:
        reply: decoded, with or without the tokens that end a turn.
        stop: further texts at which it is cut.
        keeps_markup: keep boxes; otherwise they are removed with their coordinates, and their phrases stay as text.
        shortens: shorten a sentence, see `shortened`.
    """
    answer = _before(reply.strip(), (*_TURN_ENDS, *stop)).strip()
    if not keeps_markup and _MARKUP.search(answer):
        from qwenvl.text.grounding import strip_markup  # costs seconds to import

        answer = strip_markup(answer).strip()
    return shortened(answer) if shortens else answer


def without_tags(reply: str) -> str:
    """The reply without grounding tags; coordinates stay, as where all control tokens are skipped in decoding."""
    return _TAGS.sub("", reply)


def shortened(answer: str) -> str:
    """`Yes, it is a red car.` -> `yes`; `The man is holding a frisbee` -> `frisbee`; `a cup of tea` -> `cup`.

    GQA's answers are single words, and a model that was not trained on them answers in sentences. Keeps the text
    before the first period, comma or exclamation mark, after the last "is", "are" or article, and before "of", in
    lower case. The published script matches letters instead of words, which shortens "banana tree" to "tree".
    """
    answer = re.split("[.,!]", answer.strip(), maxsplit=1)[0].lower()
    return _LEAD_IN.split(answer)[-1].split(" of ")[0].strip()


def _before(text: str, ends: Sequence[str]) -> str:
    """The text up to the first of the ends in it."""
    return text[: min((place for end in ends if (place := text.find(end)) >= 0), default=len(text))]
