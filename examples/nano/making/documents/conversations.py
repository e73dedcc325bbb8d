"""Conversations about documents in the `messages` format: what a user asks, and the reply to learn.

Each kind is a function of an `Asker` (a document and random numbers) that returns a conversation, or None if the page
has nothing to ask about. Replies are printed values, boxes, counts, or one of a few words.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.nano.making.documents import phrasings, shape_questions
from examples.nano.making.documents.document import Document
from examples.nano.making.documents.sheet import Field
from examples.nano.making.documents.values import KINDS as VALUE_KINDS
from examples.nano.making.documents.values import SHORTEST, SPLITS, Values, known
from finetune.errors import UserError

Partner = Callable[[], Document]
"""Makes a second document of the family, to compare the first with."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and the documents they are about.

    Attributes:
        kind: one of `KINDS`, or "joined".
        messages: images are placeholders, `{"type": "image"}`, in the order of `documents`.
        documents: one or two.
        answers: accepted answers to the last question.
    """

    kind: str
    messages: list[dict[str, Any]]
    documents: tuple[Document, ...]
    answers: list[str]


def conversations(
    document: Document, kinds: Sequence[str], count: int, draw: random.Random, split: str, partner: Partner
) -> list[Conversation]:
    """Make up to `count` different conversations about a document: one of each kind, then more of any kind.

    There are fewer only if the page has no more to ask about. A transcription comes once, unless it is the only kind.

    Raises:
        UserError: the document's family has none of `kinds`.
    """
    possible = [kind for kind in kinds if kind in kinds_of(document.family)]
    if not possible:
        had = ", ".join(kinds_of(document.family))
        raise UserError(f"kinds: {document.family} has none of {', '.join(kinds)}, but {had}")
    asker = Asker(document, draw, split, partner)
    again = [kind for kind in possible if kind != "transcribe"] or possible
    made: dict[str, Conversation] = {}
    for attempt in range(count + len(possible) + 20):
        if len(made) == count:
            break
        if attempt % len(possible) == 0:
            draw.shuffle(possible)
        kind = possible[attempt] if attempt < len(possible) else draw.choice(again)
        conversation = KINDS[kind](asker)
        if conversation is not None:
            made.setdefault(str(conversation.messages[:-1]), conversation)
    return list(made.values())


def joined(made: Sequence[Conversation], draw: random.Random) -> list[Conversation]:
    """Join the conversations about the same page, or the same two pages, into one of several turns."""
    together: dict[tuple[int, ...], list[Conversation]] = {}
    for conversation in made:
        together.setdefault(tuple(map(id, conversation.documents)), []).append(conversation)
    return [_as_one(group, draw) if len(group) > 1 else group[0] for group in together.values()]


def _as_one(made: list[Conversation], draw: random.Random) -> Conversation:
    """Join conversations in random order; a transcription comes last, as later answers could be copied from it."""
    made = sorted(made, key=lambda conversation: (conversation.kind == "transcribe", draw.random()))
    messages = list(made[0].messages)
    for conversation in made[1:]:
        first, *rest = conversation.messages
        text = [part for part in first["content"] if part["type"] != "image"]
        messages += [{**first, "content": text}, *rest]
    return Conversation("joined", messages, made[-1].documents, made[-1].answers)


def kinds_of(family: str) -> tuple[str, ...]:
    """The kinds of conversation that there are about a family's documents."""
    if family == "shapes":
        return ("count", "colour", "ground", "read_box", "two_turn", "two_images", "yes_no")
    if family == "words":
        return ("transcribe", "ground", "read_box", "yes_no")
    about_all = ("fact",) if family in ("receipt", "table", "chart") else ()
    return ("transcribe", "question", *about_all, "two_turn", "two_images", "ground", "read_box", "yes_no")


def families_with(kinds: Sequence[str], families: Iterable[str]) -> tuple[str, ...]:
    """The families that have any of these kinds of conversation."""
    return tuple(family for family in families if set(kinds) & set(kinds_of(family)))


class Asker:
    """Asks about one document.

    Attributes:
        named: the fields that a question can name.
        asked: the fields asked about so far.
    """

    def __init__(self, document: Document, draw: random.Random, split: str, partner: Partner) -> None:
        assert split in SPLITS
        self.document, self.draw, self.split, self.partner = document, draw, split, partner
        self.picture = phrasings.PICTURES[document.family]
        self.named = [field for field in document.fields if field.names]
        self.asked: set[Field] = set()

    def next(self, fields: Sequence[Field]) -> Field:
        """Choose a field, if possible one not asked about yet: in joined turns, its reply could be copied."""
        field = self.draw.choice([field for field in fields if field not in self.asked] or fields)
        self.asked.add(field)
        return field

    def conversation(
        self, kind: str, turns: Sequence[tuple[str, str]], documents: Sequence[Document] = (), grounding: str = ""
    ) -> Conversation:
        """Make a conversation of (question, reply) pairs.

        Args:
            kind: one of `KINDS`.
            turns: (user's text, reply) pairs.
            documents: shown in the first turn; by default the one that is asked about.
            grounding: whose `<ref>` and `<box>` are markup, not text: "user", "both", or "" for none.
        """
        shown = tuple(documents) or (self.document,)
        messages: list[dict[str, Any]] = []
        for number, (text, reply) in enumerate(turns):
            places = [{"type": "image"} for _ in shown] if number == 0 else []
            messages.append({"role": "user", "content": [*places, {"type": "text", "text": text}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
        for message in messages:
            if grounding == "both" or grounding == message["role"]:
                message["grounding"] = True
        return Conversation(kind, messages, shown, [turns[-1][1]])

    def ask(self, field: Field) -> str:
        """A question about a field's value."""
        draw = self.draw
        if field.asks and (self.document.family == "boarding" or draw.random() < 0.3):
            return draw.choice(field.asks)
        text = draw.choice(phrasings.QUESTION).format(name=draw.choice(field.names), picture=self.picture)
        return text if draw.random() < 0.7 else text[0].upper() + text[1:]

    def box(self, field: Field, label: str | None = None) -> str:
        """A field's box as markup."""
        from qwenvl.text.boxes import box_markup  # importing qwenvl imports Transformers, which takes seconds

        width, height = self.document.image.size
        return box_markup(field.box, width=width, height=height, label=label)


def transcribe(asker: Asker) -> Conversation:
    """The text of the whole page in reading order, line by line."""
    return asker.conversation(
        "transcribe", [(asker.draw.choice(phrasings.TRANSCRIBE), "\n".join(asker.document.lines))]
    )


def question(asker: Asker) -> Conversation:
    """The value of one field."""
    field = asker.next(asker.named)
    return asker.conversation("question", [(asker.ask(field), field.value)])


def fact(asker: Asker) -> Conversation:
    """Something about the page as a whole: how many rows, which value is the highest."""
    chosen = asker.draw.choice(asker.document.facts)
    return asker.conversation("fact", [(asker.draw.choice(chosen.asks), chosen.answer)])


def two_turn(asker: Asker) -> Conversation | None:
    """Two fields; the second question is short and refers to the first."""
    if asker.document.family == "shapes":
        turns = shape_questions.two_counts(asker.document, asker.draw)
        return asker.conversation("two_turn", turns) if turns else None
    if len(asker.named) < 2:
        return None
    first = asker.next(asker.named)
    second = asker.next([field for field in asker.named if field != first])
    follow_up = asker.draw.choice(phrasings.FOLLOW_UP).format(name=asker.draw.choice(second.names))
    return asker.conversation("two_turn", [(asker.ask(first), first.value), (follow_up, second.value)])


def two_images(asker: Asker) -> Conversation | None:
    """Two pages: which has more of something, or a field of one of them."""
    draw, one, two = asker.draw, asker.document, asker.partner()
    if one.family == "shapes":
        turns = shape_questions.more_on_which(one, two, draw)
        return asker.conversation("two_images", turns, (one, two)) if turns else None
    others = {name: field for field in two.fields for name in field.names}
    comparable = [
        (name, field, others[name])
        for field in one.fields
        for name in field.names
        if name in others and field.kind in phrasings.MORE
        if field.kind == others[name].kind and field.amount != others[name].amount
    ]
    if comparable and draw.random() < 0.6:
        name, field, other = draw.choice(comparable)
        asks = tuple(text.format(more=phrasings.MORE[field.kind], name=name) for text in phrasings.COMPARE)
        own = phrasings.COMPARE_OWN.get((one.family, field.key))
        if own and draw.random() < 0.5:
            asks = own
        answer = phrasings.compared(field.value, other.value, first=known(field.amount) > known(other.amount))
        return asker.conversation("two_images", [(draw.choice(asks), answer)], (one, two))
    number = draw.choice((1, 2))
    field = asker.next([field for field in (one, two)[number - 1].fields if field.names])
    text = draw.choice(phrasings.IN_PICTURE).format(name=draw.choice(field.names), number=number)
    return asker.conversation("two_images", [(text, field.value)], (one, two))


def ground(asker: Asker) -> Conversation | None:
    """A phrase, answered with the box of a field's value, of a shape or of a line; what the page has only once."""
    document = asker.document
    values = [field.value for field in document.fields]
    fields = [field for field in document.fields if values.count(field.value) == 1]
    if not fields:
        return None
    field = asker.draw.choice(fields)
    phrase = f"the {asker.draw.choice(field.names)}" if field.names else field.value
    if field.kind == "shape":
        phrase = f"the {field.value}"
    return asker.conversation("ground", [(f"<ref>{phrase}</ref>", asker.box(field))], grounding="both")


def read_box(asker: Asker) -> Conversation:
    """A box, answered with the text or the shape in it."""
    field = asker.next(asker.document.fields)
    wordings = phrasings.WHAT_IN_BOX if field.kind == "shape" else phrasings.READ_BOX
    text = asker.draw.choice(wordings).format(box=asker.box(field))
    return asker.conversation("read_box", [(text, field.value)], grounding="user")


def count(asker: Asker) -> Conversation:
    """The number of shapes of a kind, of a colour, or in all."""
    return asker.conversation("count", [shape_questions.count(asker.document, asker.draw)])


def colour(asker: Asker) -> Conversation | None:
    """The colour of the only shape of its kind."""
    turn = shape_questions.colour(asker.document, asker.draw)
    return asker.conversation("colour", [turn]) if turn else None


def yes_no(asker: Asker) -> Conversation:
    """Whether a field has a value, or the page a text or a shape. Yes and no are equally frequent."""
    draw, document = asker.draw, asker.document
    if document.family == "shapes":
        return asker.conversation("yes_no", [shape_questions.is_there(document, draw)])
    field = draw.choice([field for field in document.fields if field.kind in VALUE_KINDS])
    answer, value = draw.choice(("Yes", "No")), field.value
    if answer == "No":
        value = _another_value(asker, field)
    wordings = phrasings.IS_IT if field.names and draw.random() < 0.7 else phrasings.IS_WRITTEN
    name = draw.choice(field.names) if field.names else ""
    return asker.conversation(
        "yes_no", [(draw.choice(wordings).format(name=name, value=value, picture=asker.picture), answer)]
    )


def _another_value(asker: Asker, field: Field) -> str:
    """A value of a field's kind and split that is not on the page."""
    values = Values(asker.draw, asker.split, asker.document.money)
    page = "\n".join(asker.document.lines).casefold()
    # About as long as the field's own, so that the length does not give the answer away.
    longest = max(len(field.value), SHORTEST.get(field.kind, 2)) + 1
    while True:
        value = values.new(field.kind, longest, upper=field.value.isupper()).text
        if value.casefold() not in page:
            return value


KINDS: dict[str, Callable[[Asker], Conversation | None]] = {
    "transcribe": transcribe,
    "question": question,
    "fact": fact,
    "two_turn": two_turn,
    "two_images": two_images,
    "ground": ground,
    "read_box": read_box,
    "count": count,
    "colour": colour,
    "yes_no": yes_no,
}
