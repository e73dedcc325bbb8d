"""What a family of documents works with: a blank page, values to print, and what has been written so far."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.nano.making.documents.page import Box, Page
from examples.nano.making.documents.values import TRIES, DoesNotFit, Value, Values, split_of

Choices = dict[str, Any]
"""A layout: what is chosen -> the choice. As text it is `Document.layout`."""


@dataclass(frozen=True, slots=True)
class Field:
    """A value printed on the page.

    Attributes:
        key: what the value is, whatever the label says: "date".
        label: as printed; "" if the value has none.
        value: as printed.
        box: around the value's ink.
        kind: see `values.KINDS` and `values.CLOSED_KINDS`.
        names: what a question may call it, without an article: ("issued", "date"); empty if it is not asked about.
        asks: whole questions about this field alone.
        amount: see `Value`.
    """

    key: str
    label: str
    value: str
    box: Box
    kind: str
    names: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    amount: float | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """A question about the page as a whole, in several wordings, and its answer."""

    asks: tuple[str, ...]
    answer: str


@dataclass
class Sheet:
    """A document in the making.

    Attributes:
        page: to write on.
        values: to print.
        draw: the document's random numbers.
        layout, fields, facts, lines: what a family adds; see `Document`.
    """

    family: str
    page: Page
    values: Values
    draw: random.Random
    layout: str = ""
    fields: list[Field] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def choose(self, make: Callable[[random.Random], Choices]) -> Choices:
        """Draw a layout with `make` until one belongs to the document's split.

        Raises:
            DoesNotFit: none did.
        """
        for _ in range(TRIES):
            choices = make(self.draw)
            written = " ".join(f"{name}={_written(choice)}" for name, choice in choices.items())
            self.layout = f"{self.family}: {written}"
            if split_of(self.layout) == self.values.split:
                return choices
        raise DoesNotFit

    def add(
        self, key: str, label: str, value: Value, box: Box, names: Sequence[str] = (), asks: Sequence[str] = ()
    ) -> None:
        """Record a value that was written."""
        unique = tuple(dict.fromkeys(names))
        self.fields.append(Field(key, label, value.text, box, value.kind, unique, tuple(asks), value.amount))


def _written(choice: object) -> str:
    return "+".join(map(str, choice)) if isinstance(choice, list | tuple) else str(choice)
