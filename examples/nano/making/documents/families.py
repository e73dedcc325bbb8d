"""All families of documents by name. A family takes a `Sheet` and writes its page."""

from collections.abc import Callable

from examples.nano.making.documents.document import Sheet
from examples.nano.making.documents.families_boarding import boarding
from examples.nano.making.documents.families_cards import card
from examples.nano.making.documents.families_figures import chart, shapes
from examples.nano.making.documents.families_forms import form, label
from examples.nano.making.documents.families_tables import receipt, table
from examples.nano.making.documents.families_words import words

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
}

HELD_OUT = ("boarding",)
"""Not drawn unless asked for: what a trained model is moved to. Its values are of the same kinds as elsewhere."""
