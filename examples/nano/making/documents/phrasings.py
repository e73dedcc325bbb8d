"""The wordings of questions. {name} is what a field is called, {picture} what the family's picture is called."""

PICTURES = {
    "words": "page",
    "form": "form",
    "receipt": "receipt",
    "table": "table",
    "label": "label",
    "chart": "chart",
    "shapes": "picture",
    "card": "card",
    "boarding": "boarding pass",
    "register": "page",
}

TRANSCRIBE = (
    "Read the page.",
    "What is written here?",
    "Write down all the text.",
    "Transcribe the picture.",
    "Read everything from top to bottom.",
    "What does the page say?",
    "Copy the text line by line.",
)

QUESTION = (
    "What is the {name}?",
    "{name}?",
    "Read the {name}.",
    "Which {name} is on the {picture}?",
    "Tell me the {name}.",
    "Give the {name}.",
    "What does the {picture} say for the {name}?",
    "Find the {name}.",
    "Can you read the {name}?",
    "The {name}, please.",
)

FOLLOW_UP = (
    "And the {name}?",
    "What about the {name}?",
    "And {name}?",
    "Now the {name}.",
    "The {name} as well, please.",
)

IN_PICTURE = (
    "What is the {name} in Picture {number}?",
    "Read the {name} of Picture {number}.",
    "{name} in Picture {number}?",
    "Which {name} does Picture {number} show?",
)

COMPARE = (
    "Which picture has the {more} {name}?",
    "On which picture is the {more} {name}?",
    "Is the {name} {more} in Picture 1 or Picture 2?",
    "Where is the {name} {more}?",
)
"""For two pictures; the reply is `compared`."""

MORE = {"price": "higher", "weight": "larger", "percent": "higher", "number": "higher"}
"""Kinds of values that are compared -> the word for more. Dates are printed in too many ways to compare."""

COMPARE_OWN = {
    ("receipt", "total"): ("Which receipt is dearer?", "Where was more paid?"),
    ("label", "weight"): ("Which parcel is heavier?",),
}
"""(family, key) -> questions of its own about which is more."""

IS_IT = ("Is the {name} {value}?", "Is {value} the {name}?", "Does the {picture} say {value} for the {name}?")
IS_WRITTEN = ("Is {value} written here?", "Does the {picture} say {value}?", "Can you see {value} on the {picture}?")


def compared(one: object, two: object, first: bool) -> str:
    """The reply to a comparison of two pictures: both values, then the choice. So a model reads before it compares."""
    return f"{one} and {two}: Picture {1 if first else 2}"


READ_BOX = ("What is written in {box}?", "Read {box}.", "What does {box} say?", "Which text is in {box}?")
WHAT_IN_BOX = ("What is in {box}?", "Which shape is in {box}?", "Name the shape in {box}.")

COUNT = ("How many {what} are there?", "Count the {what}.", "How many {what} do you see?", "{what}: how many?")
COUNT_MORE = ("And {what}?", "And how many {what}?", "What about the {what}?")
COLOUR = ("What colour is the {shape}?", "Which colour has the {shape}?", "The {shape} is of which colour?")
IS_THERE = ("Is there a {what}?", "Do you see a {what}?", "Does the picture show a {what}?")
MORE_SHAPES = ("Which picture has more {what}?", "Where are more {what}?", "On which picture are there more {what}?")
