"""What is written on pages: names, dates, prices, codes; and which split a value belongs to.

A hash of its text assigns a value to one split, so that no free-form answer of a test was printed in training. Small
closed sets are exempt (`CLOSED_KINDS`): they are the same in every split.
"""

import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b

from examples.nano.making.documents import word_lists as lists

SPLITS = ("train", "validation", "test")
_STARTS = (80, 90)  # percent: train below the first, validation below the second, then test

CLOSED_KINDS = ("month", "shape", "payment")
"""Kinds of values that every split has, as it has labels, titles, colours, counts, "Picture 2", "Yes" and "No"."""

SHORTEST = {"name": 7, "city": 3, "shop": 7, "date": 8, "time": 4, "price": 4, "phone": 7, "code": 4, "weight": 3}
"""Fewest characters of a kind's values, where that is more than two."""

TRIES = 400
"""Draws before giving up. A split with a tenth of all values is missed by all of them with a probability of 1e-18."""

_FIRST_DAY, _LAST_DAY = date(2015, 1, 1).toordinal(), date(2029, 12, 31).toordinal()

MONEY = ("$%", "%", "% EUR", "EUR %", "USD %", "% kr", "CHF %", "GBP %", "% zl", "$ %", "%-")
"""How prices are printed; % stands for the number."""
_WITH_COMMA = ("% EUR", "% kr", "% zl", "%-")


class DoesNotFit(Exception):
    """What was drawn does not fit on the page, or no value was found. `document.make_document` then draws again."""


@dataclass(frozen=True, slots=True)
class Value:
    """Something to print.

    Attributes:
        text: as printed.
        kind: one of `KINDS` or `CLOSED_KINDS`.
        amount: by which values of its kind are compared (cents, days, minutes, grams); None if they cannot be.
    """

    text: str
    kind: str
    amount: float | None = None


def known(amount: float | None) -> float:
    """The amount of a value whose kind can be compared."""
    assert amount is not None, "this kind of value has no amount"
    return amount


def split_of(text: str) -> str:
    """The split that a value or a layout belongs to, whatever its case."""
    digest = blake2b(text.casefold().encode(), digest_size=8).digest()
    return SPLITS[bisect_right(_STARTS, int.from_bytes(digest, "big") % 100)]


class Values:
    """Draws the values of one document, all different.

    Args:
        draw: the document's random numbers.
        split: of every value.
        money: how prices are printed, one of `MONEY`.
    """

    def __init__(self, draw: random.Random, split: str, money: str) -> None:
        self.draw, self.split, self.money = draw, split, money
        self._taken: set[str] = set()

    def new(self, kind: str, longest: int = 14, upper: bool = False) -> Value:
        """Draw a value of a kind in `KINDS`, of at most `longest` characters.

        Raises:
            DoesNotFit: none was found.
        """
        make = KINDS[kind]
        for _ in range(TRIES):
            text, amount = make(self.draw, self.money)
            if len(text) <= longest and self.take(text):
                return Value(text.upper() if upper else text, kind, amount)
        raise DoesNotFit

    def take(self, text: str) -> bool:
        """Whether a text belongs to this split and is new on the page; if so, it is marked as used."""
        if text.casefold() in self._taken or split_of(text) != self.split:
            return False
        self._taken.add(text.casefold())
        return True

    def bill(self, count: int, highest: int) -> tuple[list[Value], Value]:
        """Draw `count` prices of up to `highest` cents with their sum, all different and of this split.

        Raises:
            DoesNotFit: none were found.
        """
        least = 50
        if self.money == "%-":  # there are fewer whole numbers
            least, highest = 100, 20 * highest

        def one() -> tuple[str, int]:
            for _ in range(TRIES):
                text, amount = print_money(self.draw.randrange(least, highest, 5), self.money)
                if split_of(text) == self.split:
                    return text, amount
            raise DoesNotFit

        first = [one() for _ in range(count - 1)]
        for _ in range(TRIES):
            prices = [*first, one()]
            total = print_money(sum(amount for _, amount in prices), self.money)
            texts = {text for text, _ in [*prices, total]}
            if len(texts) == count + 1 and split_of(total[0]) == self.split:
                self._taken |= {text.casefold() for text in texts}
                *values, last = [Value(text, "price", amount) for text, amount in [*prices, total]]
                return values, last
        raise DoesNotFit


def print_money(cents: int, money: str) -> tuple[str, int]:
    """An amount as printed, and the amount that the print shows, in cents."""
    if money == "%-":
        return f"{cents // 100},-", cents // 100 * 100
    number = f"{cents / 100:.2f}"
    return money.replace("%", number.replace(".", ",") if money in _WITH_COMMA else number), cents


def _name(draw: random.Random, money: str) -> tuple[str, None]:
    first, last = draw.choice(lists.FIRST_NAMES), draw.choice(lists.LAST_STARTS) + draw.choice(lists.LAST_ENDS)
    return draw.choice((f"{first} {last}", f"{first} {last}", f"{first[0]}. {last}", f"{last}, {first}")), None


def _city(draw: random.Random, money: str) -> tuple[str, None]:
    return draw.choice(lists.CITY_STARTS) + draw.choice(lists.CITY_ENDS), None


def _shop(draw: random.Random, money: str) -> tuple[str, None]:
    return f"{draw.choice(lists.SHOP_STARTS)} {draw.choice(lists.SHOP_ENDS)}", None


def _item(draw: random.Random, money: str) -> tuple[str, None]:
    item = draw.choice(lists.ITEMS)
    return (item if draw.random() < 0.6 else f"{draw.choice(lists.ITEM_KINDS)} {item}"), None


def _word(draw: random.Random, money: str) -> tuple[str, None]:
    syllables = draw.choice((1, 2, 2, 3))
    word = "".join(draw.choice(lists.ONSETS) + draw.choice(lists.VOWELS) for _ in range(syllables))
    word += draw.choice(lists.CODAS)
    return draw.choice((word, word.capitalize(), word.upper())), None


def _date(draw: random.Random, money: str) -> tuple[str, int]:
    day = date.fromordinal(draw.randint(_FIRST_DAY, _LAST_DAY))
    month = lists.MONTHS[day.month - 1]
    formats = (
        f"{day.year}-{day.month:02}-{day.day:02}",
        f"{day.day:02}.{day.month:02}.{day.year}",
        f"{day.day}/{day.month}/{day.year}",
        f"{day.day:02}/{day.month:02}/{day.year % 100:02}",
        f"{day.day} {month} {day.year}",
        f"{month} {day.day}, {day.year}",
        f"{day.day:02}-{month.upper()}-{day.year % 100:02}",
    )
    return draw.choice(formats), day.toordinal()


def _time(draw: random.Random, money: str) -> tuple[str, int]:
    hour, minute = draw.randrange(24), draw.randrange(60)
    half = f"{hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}"
    formats = (f"{hour:02}:{minute:02}", f"{hour}.{minute:02}", f"{hour}h{minute:02}", half)
    return draw.choice(formats), 60 * hour + minute


def _price(draw: random.Random, money: str) -> tuple[str, int]:
    return print_money(draw.randrange(50, draw.choice((2000, 10_000, 100_000)), 5), money)


def _code(draw: random.Random, money: str) -> tuple[str, None]:
    pattern = draw.choice(("AA-0000", "A0A0", "AA0000", "00-AA-0", "AA 000", "A00-000", "A000", "0000A"))
    return _filled(draw, pattern), None


def _place(draw: random.Random, money: str) -> tuple[str, None]:
    """A room, a gate or a seat."""
    return _filled(draw, draw.choice(("A0", "A00", "00A", "0A", "A-00", "000A", "A000"))), None


def _phone(draw: random.Random, money: str) -> tuple[str, None]:
    return _filled(draw, draw.choice(("000 0000", "000-0000", "00 00 00", "0000 000", "000-000"))), None


def _filled(draw: random.Random, pattern: str) -> str:
    letter = {"A": lists.CODE_LETTERS, "0": "0123456789"}
    return "".join(draw.choice(letter[mark]) if mark in letter else mark for mark in pattern)


def _weight(draw: random.Random, money: str) -> tuple[str, float]:
    unit, grams = draw.choice((("kg", 1000), ("kg", 1000), ("g", 1), ("lb", 453.6), ("t", 1e6)))
    if unit == "g":
        number = draw.randrange(5, 1000)
        return f"{number} g", number
    tenths = draw.randrange(2, 700)
    return f"{tenths / 10:.1f} {unit}", tenths / 10 * grams


def _percent(draw: random.Random, money: str) -> tuple[str, float]:
    tenths = draw.randrange(1, 1000)
    if draw.random() < 0.5:
        tenths = tenths // 10 * 10
    return f"{tenths / 10:g}%", tenths / 10


def _number(draw: random.Random, money: str) -> tuple[str, int]:
    number = draw.randrange(1, draw.choice((100, 100, 1000, 10_000)))
    return str(number), number


KINDS: dict[str, Callable[[random.Random, str], tuple[str, float | None]]] = {
    "name": _name,
    "city": _city,
    "shop": _shop,
    "item": _item,
    "word": _word,
    "date": _date,
    "time": _time,
    "price": _price,
    "code": _code,
    "place": _place,
    "phone": _phone,
    "weight": _weight,
    "percent": _percent,
    "number": _number,
}
"""Kind -> function that draws (text, amount). Some kinds have few short values, so do not ask for too short ones."""
