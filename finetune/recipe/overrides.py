"""Overrides: `key.path=value` on the command line, laid over a recipe's file before it is validated."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune.recipe.problems import Place, Problem, RecipeError, dotted
from finetune.recipe.yaml_file import Document, KeyPath, read_yaml


@dataclass(frozen=True)
class Override:
    """One override, read: its key path as written, and its value as a document."""

    text: str
    path: tuple[str, ...]
    value: Document


def read_overrides(texts: Iterable[str], file: str) -> tuple[list[Override], list[Problem]]:
    """Read `key.path=value` strings; values are YAML: `2e-4`, `null`, `[c_attn, w1]`, `"text: with a colon"`.

    Args:
        texts: as given, each one override.
        file: the recipe they are laid over, for places.
    """
    overrides, problems = [], []
    for text in texts:
        key, equals, value = text.partition("=")
        place = Place(file, override=text)
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            problems.append(Problem(place, "", "is not of the form key.path=value", "as in train.max_steps=24"))
            continue
        try:
            document = read_yaml(value, file, override=text)
        except RecipeError as error:
            problems += [Problem(found.place, dotted(path), found.reason, found.remedy) for found in error.problems]
            continue
        overrides.append(Override(text, path, document))
    return overrides, problems


def apply_overrides(document: Document, overrides: Iterable[Override]) -> Iterator[Problem]:
    """Lay overrides over a document in their order, so that the last one of a key counts.

    A key that is not there yet is made, and a null on the way becomes a mapping (`adapter.r=8` over `adapter: null`).
    List items go by index; in a list of one, the index may be left out. What an override replaces is gone, with
    whatever was wrong in it.

    Yields:
        A problem for each override that leads nowhere.
    """
    for override in overrides:
        place = Place(document.places[()].file, override=override.text)
        here: Any = document.value
        path: KeyPath = ()
        for step, last in zip(override.path, [*[False] * (len(override.path) - 1), True], strict=True):
            if isinstance(here, list) and not step.isdecimal() and len(here) == 1 and isinstance(here[0], dict):
                here, path = here[0], (*path, 0)
            if isinstance(here, list):
                if not step.isdecimal() or int(step) >= len(here):
                    indices = f"0 to {len(here) - 1}" if here else "none: it is empty"
                    yield Problem(place, dotted(override.path), f"{dotted(path)} is a list, its indices are {indices}")
                    break
                index: str | int = int(step)
            elif isinstance(here, dict):
                index = step
            else:
                yield Problem(place, dotted(override.path), f"{dotted(path)} is a single value: nothing is below it")
                break
            path = (*path, index)
            if last:
                here[index] = override.value.value
                _forget(document, path)
                document.places |= {(*path, *below): place for below in override.value.places}
                document.problems += [
                    ((*path, *below), replace(problem, key=dotted((*path, *below))))
                    for below, problem in override.value.problems
                ]
            elif isinstance(here, dict) and here.get(index) is None:
                here[index] = {}
            document.places.setdefault(path, place)
            here = here[index]


def _forget(document: Document, path: KeyPath) -> None:
    """Drop the places and problems at `path` and below it."""
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.problems = [(wrong, problem) for wrong, problem in document.problems if wrong[: len(path)] != path]
