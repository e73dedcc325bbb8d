"""Conversations without images in which two values are compared.

Learning to compare takes many pairs. Two pages cost two hundred image tokens a pair; in text it is one line. Replies
have the same form as about two pages (`phrasings.compared`).
"""

import json
import random
from pathlib import Path

from examples.nano.making.documents import phrasings
from examples.nano.making.documents.values import MONEY, Value, Values, known
from finetune.files.atomic_writes import write_text

TURNS = 10
KINDS = tuple(phrasings.MORE)
LONGEST = 14  # characters


def write_comparisons(count: int, to: Path, seed: int) -> None:
    """`count` conversations as JSON Lines, in the format `messages`."""
    to.parent.mkdir(parents=True, exist_ok=True)
    write_text(to, "".join(json.dumps({"messages": conversation(f"{seed}/{index}")}) + "\n" for index in range(count)))


def conversation(name: str) -> list[dict[str, str]]:
    """`TURNS` questions about which of two values is more."""
    draw = random.Random(name)
    messages = []
    for _ in range(TURNS):
        one, two = _pair(draw)
        asked = f"{one.text} or {two.text}: which is {phrasings.MORE[one.kind]}?"
        reply = phrasings.compared(one.text, two.text, first=known(one.amount) > known(two.amount))
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return messages


def _pair(draw: random.Random) -> tuple[Value, Value]:
    """Two different values of a kind; prices have the same currency."""
    kind = draw.choice(KINDS)
    while True:
        values = Values(draw, "train", draw.choice(MONEY))
        one, two = values.new(kind, LONGEST), values.new(kind, LONGEST)
        if one.amount != two.amount:
            return one, two
