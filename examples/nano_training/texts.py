"""What the nano is trained on: families, kinds of conversation, and the texts that its vocabulary is counted on."""

import re
from collections.abc import Iterator

from examples.nano_documents.families import FAMILIES, HELD_OUT
from examples.nano_documents.write import Plan, conversations_of

KNOWN_FAMILIES = tuple(family for family in FAMILIES if family not in (*HELD_OUT, "shapes"))
EARLY = tuple(family for family in KNOWN_FAMILIES if family != "card")
"""Families of the first three stages; of the vocabulary too."""
WITH_FIELDS = tuple(family for family in EARLY if family != "words")
READ = ("words", *EARLY)
"""Families as often as they are drawn for reading alone."""
TRAINED = (*EARLY, "table", "chart")
"""Families as often as they are drawn in training: a value is found by its row and its column in two of them."""
LATE = (*TRAINED, "card", "card", "card", "card")
"""The same of stage 4, which is there for the cards."""
ASKED = (*WITH_FIELDS, "table", "chart", "chart", "card", "card", "card")
"""The same of the questions of stage 5: more often where another field's value is easily taken for the right one."""

QUESTIONS = ("question", "two_turn")
ONE_PAGE = ("transcribe", *QUESTIONS, "read_box")
TWO_PAGES = ("two_images",)
"""Kinds of conversation that are trained, by how many pages they are about.

Without what is not learnt in the time there is: boxes as answers, whose digits take a quarter of all tokens; yes or
no, which tells too little of what there was to be seen; the highest of several values, how many there are; shapes.
"""

_MARKUP = re.compile(r"</?(?:ref|box)>")
_NUMBERS = re.compile(r"\(\d+,\d+\)")


def conversation_texts(documents: int, seed: int = 0) -> Iterator[str]:
    """Texts of all turns about so many training documents; markup has tokens of its own, boxes are digits."""
    plan = Plan("train", EARLY, (*ONE_PAGE, *TWO_PAGES), documents, per_image=3, seed=seed)
    for index in range(documents):
        for conversation in conversations_of(plan, index):
            for message in conversation.messages:
                for part in message["content"]:
                    if part["type"] == "text":
                        yield _NUMBERS.sub("", _MARKUP.sub(" ", part["text"]))
