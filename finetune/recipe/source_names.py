"""What the scores of one source of the evaluation data go by: `boarding` in `eval_anls_boarding`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

NAME = re.compile(r"\w[\w.-]*")
"""A name is part of a logged key, of a folder's name and of lines to read."""


class Named(Protocol):
    """Of a source, what names it: where it is, and the name it was given, if any."""

    path: str
    name: str | None


def source_name(source: Named) -> str:
    """The name given, or that of the file, folder or hub dataset without folders and ending."""
    if source.name is not None:
        return source.name
    return re.sub(r"[^\w.-]+", "_", Path(source.path).stem).lstrip("_.-") or "data"


def source_names(sources: Sequence[Named]) -> list[str]:
    """The name of each source, in their order; one may come twice, see `name_given_twice`."""
    return [source_name(source) for source in sources]


def name_given_twice(names: Sequence[str]) -> str | None:
    """The first name that several sources have; None where all differ, as scores are told apart by them."""
    return next((name for number, name in enumerate(names) if name in names[:number]), None)
