"""A source of a recipe as readers take it, also with settings that a recipe refuses."""

from types import SimpleNamespace


def source(path, row_format="messages", **settings):
    given = {
        "config": None,
        "split": None,
        "weight": 1.0,
        "limit": None,
        "columns": {},
        "prompt": None,
        "box_form": None,
        "streaming": False,
        "encoding": None,
        "delimiter": None,
        "annotations": None,
        "part": None,
    }
    return SimpleNamespace(path=str(path), format=row_format, **given | settings)
