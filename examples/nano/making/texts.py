"""What the nano is trained on: families, kinds of conversation, and the texts that its vocabulary is counted on."""

import re
from collections.abc import Iterator

from examples.nano.making.documents.families import FAMILIES, HELD_OUT
from examples.nano.making.documents.write import Plan, conversations_of
from qwenvl.text.chat import DEFAULT_SYSTEM

KNOWN_FAMILIES = tuple(family for family in FAMILIES if family not in (*HELD_OUT, "shapes"))
WITH_FIELDS = tuple(family for family in KNOWN_FAMILIES if family != "words")
READ = ("words", *KNOWN_FAMILIES)
"""Families as often as they are drawn for reading alone."""
TRAINED = (*KNOWN_FAMILIES, "table", "chart", "card", "card")
"""Families as often as they are drawn in training.

A value is found by its row and its column in tables and charts; a card's labels are any words, and stand above values.
"""
ASKED = (*WITH_FIELDS, "table", "table", "chart", "chart", "chart", "chart", "chart", "card", "card", "card")
"""The same of the questions of stage 3: more often where another field's value is easily taken for the right one."""

QUESTIONS = ("question", "two_turn")
ONE_PAGE = ("transcribe", *QUESTIONS, "read_box")
TWO_PAGES = ("two_images",)
"""Kinds of conversation that are trained, by how many pages they are about.

Without what is not learnt in the time there is: boxes as answers, whose digits take a quarter of all tokens; yes or
no, which tells too little of what there was to be seen; the highest of several values, how many there are; shapes.
"""

_MARKUP = re.compile(r"</?(?:ref|box)>")
_NUMBERS = re.compile(r"\(\d+,\d+\)")


def asked_texts(documents: int, seed: int = 0) -> Iterator[str]:
    """What stands in conversations about so many training documents besides the replies.

    Roles and system prompt are in every conversation, and have tokens of their own in the published vocabulary too. Of
    replies nothing is counted: values are read letter by letter, those of unseen documents like those that were seen.
    Markup has tokens of its own, and boxes are digits.
    """
    plan = Plan("train", KNOWN_FAMILIES, (*ONE_PAGE, *TWO_PAGES), documents, per_image=3, seed=seed)
    for index in range(documents):
        for conversation in conversations_of(plan, index):
            yield f"system\n{DEFAULT_SYSTEM}"
            for message in conversation.messages:
                yield f"{message['role']}\n"
                if message["role"] == "user":
                    for part in message["content"]:
                        if part["type"] == "text":
                            yield _NUMBERS.sub("", _MARKUP.sub(" ", part["text"]))
