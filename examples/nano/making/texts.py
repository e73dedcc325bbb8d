"""What the nano is trained on: families, kinds of conversation, and the texts of its vocabulary."""

import re
from collections.abc import Iterator

from examples.nano.making.documents.families import FAMILIES, HELD_OUT, LARGE
from examples.nano.making.documents.write import Plan, conversations_of
from qwenvl.text.chat import DEFAULT_SYSTEM

KNOWN_FAMILIES = tuple(family for family in FAMILIES if family not in (*HELD_OUT, *LARGE, "shapes"))
WITH_FIELDS = tuple(family for family in KNOWN_FAMILIES if family != "words")
READ = ("words", *KNOWN_FAMILIES)
"""Families, repeated by their frequency, for transcription alone."""
TRAINED = (*KNOWN_FAMILIES, "table", "chart", "card", "card")
"""Families, repeated by their frequency in training.

Tables, charts and cards are repeated because their values are harder to find: by row and column, or below a label that
may be any word.
"""
ASKED = (*WITH_FIELDS, "table", "table", "chart", "chart", "chart", "chart", "chart", "card", "card", "card")
"""The same for the questions of stage 3: families in which another field is easily mistaken for the right one."""

QUESTIONS = ("question", "two_turn")
ONE_PAGE = ("transcribe", *QUESTIONS, "read_box")
TWO_PAGES = ("two_images",)
"""Kinds of conversation that are trained, by the number of pages they are about.

Left out is what is not learned in this time: boxes as answers, whose digits are a quarter of all tokens; yes or no,
which is too weak a signal; the highest of several values and their number; shapes.
"""

_MARKUP = re.compile(r"</?(?:ref|box)>")
_NUMBERS = re.compile(r"\(\d+,\d+\)")


def asked_texts(documents: int, seed: int = 0) -> Iterator[str]:
    """The texts of conversations about this many training documents, without the replies.

    Roles and system prompt are part of every conversation. Replies are left out, so that values are encoded letter by
    letter, whether they were seen in training or not. So are markup, which has control tokens, and the digits of
    boxes.
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
