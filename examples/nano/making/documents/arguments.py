"""Command-line arguments that name families and kinds of conversation."""

import argparse
from collections.abc import Callable, Collection, Iterable

from examples.nano.making.documents.conversations import families_with, kinds_of


def names_from(what: str, known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: names from `known`, separated by commas."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {what} {name!r}; there are {', '.join(known)}")
        return names

    return read


def chosen_families(
    parser: argparse.ArgumentParser,
    families: tuple[str, ...] | None,
    kinds: tuple[str, ...],
    default: Iterable[str],
) -> tuple[str, ...]:
    """The families given, or those of `default` that have any of the kinds.

    Ends with exit code 2 if a family has none of the kinds.
    """
    chosen = families_with(kinds, default) if families is None else families
    for family in chosen:
        possible = kinds_of(family)
        if not set(kinds) & set(possible):
            parser.error(f"--kinds: {family} has none of {', '.join(kinds)}, but {', '.join(possible)}")
    return chosen
