"""All families of documents by name. A family takes a `Sheet` and writes its page.

`conversations.kinds_of` says what can be asked about each.
"""

from collections.abc import Callable

from examples.nano.making.documents.families.boarding import boarding
from examples.nano.making.documents.families.cards import card
from examples.nano.making.documents.families.figures import chart, shapes
from examples.nano.making.documents.families.forms import form, label
from examples.nano.making.documents.families.registers import register
from examples.nano.making.documents.families.tables import receipt, table
from examples.nano.making.documents.families.words import words
from examples.nano.making.documents.sheet import Sheet

FAMILIES: dict[str, Callable[[Sheet], None]] = {
    "words": words,
    "form": form,
    "receipt": receipt,
    "table": table,
    "label": label,
    "chart": chart,
    "shapes": shapes,
    "card": card,
    "boarding": boarding,
    "register": register,
}

HELD_OUT = ("boarding",)
"""Only made when asked for: what a trained model is fine-tuned on. Its values are of the same kinds as elsewhere."""

LARGE = ("register",)
"""Only made when asked for, too: pages for `views_experiment`, which are larger than the nano sees."""
